"""Weights of NP components: adds them to a base model, reads and writes their files, resumes runs, validates
checkpoints.
"""
