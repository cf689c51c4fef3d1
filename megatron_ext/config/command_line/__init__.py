"""Reads the command line and YAML files into the config dataclasses, checks the values, and prints errors as one
line.
"""
