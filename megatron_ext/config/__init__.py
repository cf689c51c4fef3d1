"""Configuration: a frozen tree of dataclasses, and the one place that reads the command line and YAML.

    run_config       RunConfig, the tree of a training run; a family's own subclass adds the family's groups
    groups/          its groups: model, parallel, training, optimizer, data, tokenizer, checkpoint, logging
    cross_checks     checks of several groups together, which `RunConfig.resolved` runs
    serialize        to JSON and back, and as YAML text
    command_line/    parse(): flags from the fields, files, errors in one line
        field_checks  flag_table    how a field becomes a flag; checks of values
        argument_words yaml_file values    what the command line and a file give, converted by the field's type
        merge         which source of a value wins; `--show-config`
        help_text     `--help`

Importing any of it imports neither torch nor megatron.
"""
