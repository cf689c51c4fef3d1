"""Formats `--help`: the required flags, then the flags of each config group, each with its field's docstring."""

import ast
import dataclasses
import functools
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_ext.config.command_line.flag_table import (
    CONFIG,
    DEFAULTS,
    HELP,
    SHOW_CONFIG,
    SINGLE_GROUP,
    Flag,
    Groups,
)

_WIDEST, _COLUMN = 100, 34
_KINDS = {int: "INT", float: "FLOAT", str: "TEXT"}
_OWN = (
    (
        f"{CONFIG} FILE",
        "YAML file of flags, flat or in sections named like the groups below. The command line overrides it.",
    ),
    (SHOW_CONFIG, "Print every value with its source (flag, file, checkpoint, default), and exit."),
    (HELP, "Print this help, and exit."),
)
_DEFAULTS = (f"{DEFAULTS} {{megatron}}", "Take Megatron-LM's defaults where they differ from those below.")


def format_help(
    groups: Groups,
    flags: Sequence[Flag],
    *,
    prog: str,
    description: str,
    example: str,
    supplied: Mapping[str, str],
) -> str:
    """Returns the help text.

    Args:
        groups: config groups by name, in the order in which the help lists them.
        flags: flags of the groups.
        prog: name of the program.
        description: description of the program.
        example: an example command, or "".
        supplied: maps each field that has no default but that the program fills in, to the text to show as its
            default. All other fields without a default are listed as required.
    """
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    documented = {name: field_docs(group) for name, group in groups.items()}
    required = [flag for flag in flags if flag.is_required and flag.field not in supplied]
    sections = {"required": required}
    for name in groups:
        heading = "flags" if name == SINGLE_GROUP else f"{name} options"
        sections[heading] = [flag for flag in flags if flag.group == name and flag not in required]
    lines = [f"usage: {prog} [flags]", ""]
    for paragraph in [*description.split("\n\n"), *([f"Example: {example}"] if example else [])]:
        lines += [*_paragraph(paragraph, width), ""]
    own = [*_OWN, *([_DEFAULTS] if "training" in groups else []), *_negation(flags)]
    lines += ["options:", *(line for each in own for line in _entry(*each, width))]
    for heading, members in sections.items():
        entries = [_entry(_spelled(flag), _told(flag, documented, supplied), width) for flag in members]
        lines += ["", f"{heading}:", *(line for entry in entries for line in entry)] if members else []
    return "\n".join(lines)


def _negation(flags: Sequence[Flag]) -> Iterator[tuple[str, str]]:
    """Yields one entry that explains all `--no-` flags, if there are any; an entry for each would double the list."""
    for flag in flags:
        if flag.negations and not flag.default:
            told = "Turn off a switch that the YAML file or a checkpoint has turned on, for example"
            yield "--no-SWITCH", f"{told} {flag.negations[0]}."
            return


def _paragraph(text: str, width: int) -> list[str]:
    """Wraps a paragraph to `width`; leaves a paragraph with indented lines unchanged."""
    if any(line.startswith(" ") for line in text.split("\n")):
        return text.split("\n")
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _spelled(flag: Flag) -> str:
    """Returns the flag with its aliases and the placeholder for its value."""
    if flag.is_switch:
        return ", ".join((*flag.names, *flag.negations[: bool(flag.default)]))
    value = flag.metavar or ("{" + ", ".join(flag.choices) + "}" if flag.choices else _KINDS[flag.kind])
    if flag.takes_many and not flag.is_repeated and flag.metavar is None:
        value = f"{value} ..."
    return f"{', '.join(flag.names)} {value}"


def _told(flag: Flag, documented: Mapping[str, Mapping[str, str]], supplied: Mapping[str, str]) -> str:
    text = " ".join(documented[flag.group].get(flag.field, "").split())
    if flag.is_required:
        if flag.field not in supplied:
            return text  # its heading says that it is required
        told = f"default: {supplied[flag.field]}"
    elif flag.default is None or flag.default == () or (flag.is_switch and not flag.default):
        return text
    elif flag.is_switch:
        told = "default: on"
    else:
        values = flag.default if isinstance(flag.default, tuple) else (flag.default,)
        told = f"default: {' '.join(map(str, values))}"
    return f"{text} ({told})".lstrip()


def _entry(spelled: str, text: str, width: int) -> Iterator[str]:
    """Yields the help lines of one flag, with the text beside a short flag or below a long one."""
    told = textwrap.wrap(text, width - _COLUMN, break_long_words=False, break_on_hyphens=False)
    head = textwrap.wrap(
        spelled, width - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    if len(head) == 1 and len(head[0]) + 4 <= _COLUMN and told:
        yield f"  {head[0]}".ljust(_COLUMN) + told.pop(0)
    else:
        yield from (f"  {line}" for line in head)
    yield from (" " * _COLUMN + line for line in told)


def field_docs(group: type[Any]) -> dict[str, str]:
    """Returns the docstring of each field of a dataclass and its bases; empty if the source file is missing."""
    found: dict[str, str] = {}
    for owner in reversed(group.__mro__):
        if dataclasses.is_dataclass(owner):
            for node in _classes(inspect.getsourcefile(sys.modules[owner.__module__]) or ""):
                if node.name == owner.__name__:
                    found |= dict(_documented(node.body))
    return found


@functools.cache
def _classes(path: str) -> tuple[ast.ClassDef, ...]:
    if not os.path.isfile(path):
        return ()
    with open(path, encoding="utf-8") as file:
        return tuple(node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.ClassDef))


def _documented(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    name = None
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield name, str(node.value.value)
            name = None
        else:
            name = None
