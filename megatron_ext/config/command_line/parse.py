"""Reads the command line and the YAML file into a configuration; the only module that does so.

`parse` derives the flags from the fields of all config groups, reads the command line and the --config file, and
returns the configuration:

    config = parse(RunConfig, prog="pretrain_x.py", description="...")
    config.model.num_layers

A script may add values that depend on the given flags (from a mode or a checkpoint); `merge` defines the precedence.
Nothing here imports torch, so that `--help` and errors in flags appear immediately.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ext.config.command_line.argument_words import read_arguments
from megatron_ext.config.command_line.error_lines import exit_with_error, main_guard, run_main
from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.flag_table import (
    CONFIG,
    DEFAULTS,
    HELP,
    SHOW_CONFIG,
    Flag,
    flags_of,
    groups_of,
    is_training_run,
    known_flags,
    missing_flags,
)
from megatron_ext.config.command_line.help_text import format_help
from megatron_ext.config.command_line.megatron_words import report_ignored, sort_megatron_flags
from megatron_ext.config.command_line.merge import (
    FLAG,
    Found,
    Merged,
    Source,
    build,
    format_sources,
    name_yaml,
)
from megatron_ext.config.megatron_lm.megatron_defaults import megatron_defaults

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Found", "known_flags", "main_guard", "parse", "run_main"]

T = TypeVar("T", bound="DataclassInstance")
Given = Mapping[str, Any]
"""Maps each field that the command line or the YAML file sets to its value."""


def parse(
    config_type: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    example: str = "",
    find: Callable[[Given], Sequence[Found]] | None = None,
    sections: Mapping[str, Container[str]] = MappingProxyType({}),
    supplied: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Reads the command line into a configuration.

    Args:
        config_type: a dataclass whose fields are config groups, or a single config group. The name of a group is its
            heading in `--help` and its section in the YAML file.
        argv: arguments without the program's name; the default is `sys.argv[1:]`.
        prog: name of the program in `--help`.
        description: description of the program in `--help`.
        example: an example command for `--help`.
        find: called with the given values; returns sources of values for fields that were not given. A later source
            overrides an earlier one.
        sections: maps the name of a YAML section to further groups whose flags the section may hold.
        supplied: maps a field that `find` fills in to the text that `--help` shows as its default.

    Raises:
        SystemExit: with code 2 after a user error, which is printed as one line; with code 0 after `--help` and
            `--show-config`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or HELP in arguments:
        print(
            format_help(
                _own_groups_first(config_type),
                flags_of(config_type),
                prog=prog or os.path.basename(sys.argv[0]),
                description=description,
                example=example,
                supplied=supplied,
            )
        )
        raise SystemExit(0)
    merged = Merged()
    try:
        shows = SHOW_CONFIG in arguments
        ignored = _merge(
            merged, config_type, [word for word in arguments if word != SHOW_CONFIG], find, sections
        )
        config = build(config_type, merged)
    except ValueError as error:
        exit_with_error(name_yaml(str(error), merged.sources))
    report_ignored(ignored)
    if shows:
        if int(os.environ.get("RANK") or 0) == 0:
            print(format_sources(config, merged.sources))
        raise SystemExit(0)
    return config


def _merge(
    merged: Merged,
    config_type: type[Any],
    arguments: Sequence[str],
    find: Callable[[Given], Sequence[Found]] | None,
    sections: Mapping[str, Container[str]],
) -> list[str]:
    """Adds the values of all sources in order of precedence; returns the Megatron-LM flags that have no effect here.

    Raises:
        ValueError: a value is invalid, or a required one is missing.
    """
    groups, flags = groups_of(config_type), flags_of(config_type)
    arguments, path = _take(arguments, CONFIG, "the path of a YAML file")
    whose, ignored, refused = None, [], []
    if is_training_run(config_type):
        arguments, whose = _take(arguments, DEFAULTS, "a value, which must be megatron")
        if whose not in (None, "megatron"):
            raise ValueError(f"{DEFAULTS} {whose}: must be megatron")
        sorted_words = sort_megatron_flags(arguments, flags)
        arguments, ignored, refused = sorted_words.arguments, sorted_words.ignored, sorted_words.refused
    wrong = [f"cannot be used here: {', '.join(refused)}"] if refused else []
    merged.add(FLAG, read_arguments(arguments, flags, wrong))
    if path is not None:
        # Imported late, because importing YAML takes time and most command lines have no file.
        from megatron_ext.config.command_line.yaml_file import read_yaml

        merged.add(Source(path, is_yaml=True), read_yaml(path, groups, flags, sections))
    given = MappingProxyType(dict(merged.values))
    founds = list(find(given)) if find is not None else []
    if whose is not None:
        founds.insert(0, Found(f"Megatron-LM ({DEFAULTS} {whose})", megatron_defaults(given)))
    for found in reversed(founds):
        if found.wins:
            _replace_given(merged, found, flags)
        else:
            merged.add(Source(found.source), found.values(flags))
    missing = missing_flags(groups, flags, merged.values)
    if missing:
        raise ValueError(f"missing required flag{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return ignored


def _replace_given(merged: Merged, found: Found, flags: Sequence[Flag]) -> None:
    """Replaces values that the user has set, and prints which ones."""
    fields = [field for values in found.sections.values() for field in values]
    changed = merged.replace(Source(found.source), dict.fromkeys(fields) | found.values(flags))
    if changed and int(os.environ.get("RANK") or 0) == 0:
        told = [f"{flag_name(name)} {_told(new)}, not {_told(old)}" for name, (old, new) in changed.items()]
        print(f"{found.source} has {'; '.join(told)} (--use-checkpoint-args)", flush=True)


def _told(value: object) -> str:
    return "its default" if value is None else str(value)


def _own_groups_first(config_type: type[Any]) -> dict[str, type[Any]]:
    """Returns the config groups, starting with the groups that a model family adds to `RunConfig`."""
    groups = groups_of(config_type)
    bases = filter(dataclasses.is_dataclass, config_type.__mro__[1:])
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    return {name: groups[name] for name in sorted(groups, key=inherited.__contains__)}


def _take(arguments: Sequence[str], flag: str, what: str) -> tuple[list[str], str | None]:
    """Removes `FLAG VALUE` or `FLAG=VALUE` from the arguments; returns the other arguments and the value.

    Args:
        arguments: the words of the command line.
        flag: the flag.
        what: what the value is, for the error message.

    Raises:
        ValueError: the flag has no value.
    """
    rest: list[str] = []
    value: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{flag}: requires {what}")
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, value
