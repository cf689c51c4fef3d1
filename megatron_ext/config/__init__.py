"""Configuration: a frozen tree of dataclasses, and the only code that reads the command line and YAML files.

Modules:

    run_config       RunConfig, the configuration of a training run; each model family adds its groups in a subclass
    groups/          one dataclass per config group; each field is a flag, and its docstring is the flag's help text
    cross_checks     checks that compare several config groups; `RunConfig.resolved` runs them
    serialize        converts a configuration to JSON and YAML, and back
    command_line/    parse(): reads flags and `--config file.yaml`, and reports errors as one line
        flag_table, field_checks             turn fields into flags; check values
        argument_words, yaml_file, values    read the command line and YAML files; convert values to the field's type
        merge                                decides which source sets a value; prints `--show-config`
        help_text                            prints `--help`

Nothing here imports torch or megatron.
"""
