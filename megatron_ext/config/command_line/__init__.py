"""Reads the command line and YAML files into the config dataclasses: flags, checks of values, error lines."""
