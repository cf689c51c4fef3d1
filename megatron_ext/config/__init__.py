"""Configuration: frozen dataclasses, and the one place that reads the command line and YAML files.

    groups/          one dataclass per config group; a field is a flag, its docstring the help text
    command_line/    parse(): flags, `--config file.yaml` and one-line errors
    cross_checks     checks between several config groups
    serialize        to JSON and YAML, and back

Nothing here imports torch or megatron.
"""
