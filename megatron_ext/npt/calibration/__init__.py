"""Calibration: computes initial NP factors, with which NPT layers are near the base layers, from the base model and
some tokens.
"""
