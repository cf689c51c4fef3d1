"""From arguments and YAML to the dataclasses: flags, checks of values, error lines."""
