"""Factors of the form key_value in closed form, from second moments of one pass of the base model over tokens."""
