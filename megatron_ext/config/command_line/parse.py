"""Reads the command line and YAML files; nothing else does.

`parse` derives a flat set of flags from the fields of the config groups, reads `--config file.yaml`, then the command
line, which overrides it, and returns the dataclasses by name:

    configs = parse({"model": ModelConfig, "parallel": ParallelConfig}, prog="pretrain_x.py", description="...")
    configs["model"].num_layers

A script may add defaults that depend on the flags (a mode, a checkpoint to load); YAML and flags override them.
Nothing here imports torch, so that `--help` and errors in flags appear at once.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import tyro

from megatron_ext.config.command_line.error_lines import exit_with_error, main_guard, run_main
from megatron_ext.config.command_line.field_checks import check_numbers
from megatron_ext.config.command_line.flag_table import (
    ConfigGroups,
    Flag,
    flags_of,
    given_flags,
    missing_flags,
    with_dashes,
)
from megatron_ext.config.command_line.yaml_file import default_arguments, yaml_arguments

__all__ = ["known_flags", "main_guard", "parse", "run_main"]

_CONFIG_HELP = (
    "YAML file of flags, flat or in sections named like the groups below. The command line overrides it."
)


def parse(
    groups: type[Any] | ConfigGroups,
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    example: str = "",
    defaults: Callable[[Mapping[str, str]], Mapping[str, Mapping[str, Any]]] | None = None,
    sections: Mapping[str, Container[str]] = MappingProxyType({}),
    supplied: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Reads the command line into configuration dataclasses.

    Args:
        groups: name -> dataclass (the name is the heading in `--help` and the section in YAML), or one dataclass.
        argv: arguments without the program's name; the default is `sys.argv[1:]`.
        prog: name of the program in `--help`.
        description: description of the program in `--help`.
        example: an example command for `--help`.
        defaults: called with field name -> text of the given flags that take one value; returns group name -> field
            name -> default.
        sections: name of a YAML section -> further groups whose flags it may hold.
        supplied: field name -> text that `--help` shows as its default, because `defaults` provides the value.

    Returns:
        Name -> instance; for a single dataclass the name is `config`.

    Raises:
        SystemExit: code 2 after a user error, which is printed as one line; code 0 after `--help`.
    """
    by_name = _by_name(groups)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        text = description + (f"\n\nExample: {example}" if example else "")
        _call_tyro(by_name, tyro.conf.OmitArgPrefixes, ["--help"], prog, text, supplied)
    from_yaml: list[str] = []
    try:
        arguments, path = _take_config_path(arguments)
        flags = flags_of(by_name)
        given = given_flags(arguments, flags)
        if path is not None:
            from_yaml = yaml_arguments(path, by_name, flags, given, sections)
            given |= given_flags(from_yaml, flags)
        if defaults is not None:
            chosen = defaults(_given_values(from_yaml + arguments, flags))
            from_defaults = default_arguments(chosen, flags, given)
            given |= given_flags(from_defaults, flags)
            arguments = from_defaults + arguments
        missing = missing_flags(by_name, flags, given, _given_values(from_yaml + arguments, flags))
        if missing:
            raise ValueError(f"missing required flag{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        with _one_line_errors():
            # With name="" tyro passes on a dataclass's ValueError unchanged; with the marker of --help it frames it.
            parsed = _call_tyro(by_name, tyro.conf.arg(name=""), from_yaml + arguments, prog, description)
        for name in by_name:
            check_numbers(getattr(parsed, name))
    except ValueError as error:
        message = str(error)
        from_file = {argument.partition("=")[0] for argument in from_yaml if argument.startswith("--")}
        if from_file.intersection(re.findall(r"--[\w-]+", message)):
            message += f" (see {path})"
        exit_with_error(message)
    return {name: getattr(parsed, name) for name in by_name}


def known_flags(groups: type[Any] | ConfigGroups) -> frozenset[str]:
    """Returns every spelling that the command line accepts for these groups, in dashes."""
    spellings = (flag.names + flag.negations for flag in flags_of(_by_name(groups)))
    return frozenset({"--config", "--help"}.union(*spellings))


def _given_values(arguments: Sequence[str], flags: Sequence[Flag]) -> dict[str, str]:
    """Field name -> text, for the given flags that take one value; of a repeated flag the last one counts."""
    name_of = {spelling: flag.name[2:].replace("-", "_") for flag in flags for spelling in flag.names}
    values = {}
    for place, argument in enumerate(arguments):
        spelled, equals, value = argument.partition("=")
        name = name_of.get(with_dashes(spelled)) if argument.startswith("--") else None
        if name is not None and equals:
            values[name] = value
        elif name is not None and place + 1 < len(arguments) and not arguments[place + 1].startswith("--"):
            values[name] = arguments[place + 1]
    return values


def _by_name(groups: type[Any] | ConfigGroups) -> dict[str, type[Any]]:
    return dict(groups) if isinstance(groups, Mapping) else {"config": groups}


def _call_tyro(
    by_name: ConfigGroups,
    marker: Any,
    arguments: Sequence[str],
    prog: str | None,
    description: str,
    supplied: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    # `parse` has read --config already; it is declared here only for --help.
    config_flag = tyro.conf.arg(name="config", help=_CONFIG_HELP, metavar="FILE")
    fields: list[Any] = [("config_file", Annotated[str | None, config_flag], None)]
    fields += [
        (name, Annotated[group, marker], *_shown_defaults(group, supplied)) for name, group in by_name.items()
    ]
    combined = dataclasses.make_dataclass("Flags", fields, kw_only=True)
    return tyro.cli(
        combined, prog=prog, description=description, args=arguments, config=(tyro.conf.DisallowNone,)
    )


class _Words:
    """A default that `--help` shows as a text; tyro checks only its type."""

    def __str__(self) -> str:
        return str(self.words)  # type: ignore[attr-defined]


def _shown_defaults(group: type[Any], supplied: Mapping[str, str]) -> list[Any]:
    """For `--help`: a default instance of the group that shows texts for the supplied fields; empty if it has none."""
    fields = {field.name: field for field in dataclasses.fields(group)}
    hints = typing.get_type_hints(group)
    if not supplied.keys() & fields.keys():
        return []
    shown = object.__new__(group)
    for name, field in fields.items():
        value = field.default if field.default is not dataclasses.MISSING else tyro.MISSING_NONPROP
        if name in supplied:
            value = type("Supplied", (_Words, hints[name]), {})()
            value.words = supplied[name]
        object.__setattr__(shown, name, value)
    return [dataclasses.field(default=shown)]


def _take_config_path(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config PATH` or `--config=PATH` out of the arguments."""
    rest: list[str] = []
    path: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None or path.startswith("--"):
                raise ValueError("--config: requires the path of a YAML file")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, path


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns tyro's framed error into a `ValueError` of one line, without the frame and the help below it."""
    framed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # tyro would wrap the message, and break long words
    try:
        # Redirect standard output too: tyro inspects it to choose colours and frame characters.
        with contextlib.redirect_stderr(framed), contextlib.redirect_stdout(framed):
            yield
    except SystemExit:
        raise ValueError(_unframed(framed.getvalue())) from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _unframed(framed: str) -> str:
    """Returns the text of tyro's framed error: the lines between the rule below the title and the next rule."""
    message: list[str] = []
    for line in framed.split("\n")[2:]:
        text = line.strip(" |")
        if not text.strip("-"):
            break
        message.append(text)
    return " ".join(message).removeprefix("Error parsing ") or " ".join(framed.split())
