"""Configuration: frozen dataclasses, one per concern, and the one place that reads the command line and YAML.

    model parallel training optimizer checkpoint logging data tokenizer    the concerns; a family adds its own
    validate      checks that concern several of them
    cli           parse(): flags from the fields, `--config file.yaml`, one-line errors
    fields flags  how a field becomes a flag; aliases; checks of values
    serialize     to JSON and back, and as YAML text
    errors        how a user's mistake ends a process

Importing any of it imports neither torch nor megatron.
"""
