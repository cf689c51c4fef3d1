"""Configuration: a frozen tree of dataclasses, and the one place that reads the command line and YAML files.

    run_config       RunConfig, the tree of a training run; a family's subclass adds the family's groups
    groups/          one dataclass per config group; a field is a flag, its docstring the help text
    cross_checks     checks between several config groups, which `RunConfig.resolved` runs
    serialize        to JSON and YAML, and back
    command_line/    parse(): flags, `--config file.yaml` and one-line errors
        flag_table, field_checks             how a field becomes a flag; checks of values
        argument_words, yaml_file, values    reading the command line and files; conversion to the field's type
        merge                                precedence of the sources of a value; `--show-config`
        help_text                            `--help`

Nothing here imports torch or megatron.
"""
