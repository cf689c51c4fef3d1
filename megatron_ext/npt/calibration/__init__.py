"""Calibration: computes initial NP factors from the base model and some text, so that the outputs of the NPT layers are
near those of the base layers.
"""
