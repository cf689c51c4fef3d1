"""The command line and YAML: the one place that reads either.

`parse` builds one flat set of flags from the fields of the configuration dataclasses ("concerns"), reads
`--config file.yaml` first and the command line over it, and gives the dataclasses back by name:

    configs = parse({"model": ModelConfig, "parallel": ParallelConfig}, prog="pretrain_x.py", description="...")
    configs["model"].num_layers

A YAML file holds flags (`num_layers: 12`, `-` and `_` alike), or sections by concern name, or both. A value in it
counts as if it stood on the command line before all other flags, so that one set of rules checks both. Nothing here
imports torch: `--help` and a mistyped flag answer at once.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import tyro

from megatron_ext.config.errors import exit_with_error, run_main
from megatron_ext.config.yaml_file import read_yaml

__all__ = ["known_flags", "parse", "run_main"]

Concerns = type[Any] | Mapping[str, type[Any]]


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One field of one concern, as the command line sees it."""

    name: str
    concern: str
    field: "dataclasses.Field[Any]"
    aliases: tuple[str, ...]
    is_bool: bool
    is_required: bool

    def spellings(self) -> list[str]:
        """All flags that set this field."""
        names = [self.name, *self.aliases]
        return names + ["--no-" + name[2:] for name in names] if self.is_bool else names


def parse(
    concerns: Concerns,
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    example: str = "",
) -> dict[str, Any]:
    """Reads the command line into configuration dataclasses.

    Args:
        concerns: the dataclasses by name (the name is the `--help` group and the YAML section), or a single one.
        argv: arguments without the program's name; the process's own by default.
        prog: the program's name for `--help`.
        description: what the program does, for `--help`.
        example: a command that works, printed at the end of the description.

    Returns:
        An instance for every name (for a single class its name is `config`).

    Raises:
        SystemExit: code 2 after a user's mistake, told in one line on rank 0; code 0 after `--help`.
    """
    by_name = dict(concerns) if isinstance(concerns, Mapping) else {"config": concerns}
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_help = "-h" in arguments or "--help" in arguments
    if wants_help:
        return _print_help(by_name, prog, description, example)
    try:
        arguments, yaml_path = _take_config_path(arguments)
        flags = _flags(by_name)
        given = _given(arguments, flags)
        if yaml_path is not None:
            from_yaml = _yaml_arguments(yaml_path, by_name, flags, given)
            arguments = from_yaml + arguments
            given |= _given(from_yaml, flags)
        missing = [flag.name for flag in flags if flag.is_required and flag.name not in given]
        if missing:
            raise ValueError(
                f"missing required {'flag' if len(missing) == 1 else 'flags'} {', '.join(missing)}"
            )
        with _one_line_errors():
            parsed = tyro.cli(
                _combined(by_name, tyro.conf.arg(name="")),
                prog=prog,
                args=arguments,
                config=(tyro.conf.DisallowNone,),
            )
    except ValueError as error:
        exit_with_error(str(error))
    return {name: getattr(parsed, name) for name in by_name}


def known_flags(concerns: Concerns) -> frozenset[str]:
    """Returns every spelling the command line accepts for these concerns, in dashes, `--config` and `--help` included."""
    by_name = dict(concerns) if isinstance(concerns, Mapping) else {"config": concerns}
    return frozenset(s for flag in _flags(by_name) for s in flag.spellings()) | {"--config", "--help"}


def _combined(by_name: Mapping[str, type[Any]], marker: Any) -> type[Any]:
    fields = [(name, Annotated[concern, marker]) for name, concern in by_name.items()]
    return dataclasses.make_dataclass("Flags", fields, kw_only=True)


def _flags(by_name: Mapping[str, type[Any]]) -> list[_Flag]:
    result: list[_Flag] = []
    owner: dict[str, str] = {}
    for concern, config_type in by_name.items():
        hints = typing.get_type_hints(config_type, include_extras=True)
        for field in dataclasses.fields(config_type):
            aliases, inner = _unwrap(hints[field.name])
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            name = _dashes("--" + field.name)
            result.append(_Flag(name, concern, field, aliases, inner is bool, required))
            for spelling in (name, *aliases):
                if spelling in owner:
                    raise AssertionError(f"{spelling} is declared by both {owner[spelling]} and {concern}")
                owner[spelling] = concern
    return result


def _unwrap(hint: Any) -> tuple[tuple[str, ...], Any]:
    """Splits `Annotated[T, flag(aliases=...)]` into the aliases and T."""
    if typing.get_origin(hint) is not Annotated:
        return (), hint
    inner, *metadata = typing.get_args(hint)
    aliases = tuple(alias for item in metadata for alias in getattr(item, "aliases", None) or ())
    return aliases, inner


def _dashes(flag: str) -> str:
    return "--" + flag[2:].replace("_", "-")


def _given(arguments: Sequence[str], flags: Sequence[_Flag]) -> set[str]:
    """Returns the main names of the flags in `arguments`.

    Raises:
        ValueError: if one is unknown, with the nearest known one.
    """
    main_name = {spelling: flag.name for flag in flags for spelling in flag.spellings()}
    given = set()
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        spelled = argument.partition("=")[0]
        name = main_name.get(_dashes(spelled))
        if name is None:
            near = difflib.get_close_matches(_dashes(spelled), [*main_name, "--config"], n=1)
            raise ValueError(f"unknown flag {spelled}" + (f" (did you mean {near[0]}?)" if near else ""))
        given.add(name)
    return given


def _take_config_path(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config PATH` or `--config=PATH` out of the arguments."""
    rest: list[str] = []
    path: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None:
                raise ValueError("--config: needs a file")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, path


def _yaml_arguments(
    path: str, by_name: Mapping[str, type[Any]], flags: Sequence[_Flag], given: set[str]
) -> list[str]:
    """Returns the file's values as arguments, but for those that the command line gives itself."""
    by_spelling = {spelling: flag for flag in flags for spelling in (flag.name, *flag.aliases)}
    arguments: list[str] = []
    for section, key, value in read_yaml(path, sections=by_name):
        flag = by_spelling.get(_dashes("--" + key))
        if flag is None or (section is not None and flag.concern != section):
            known = [name[2:] for name, f in by_spelling.items() if section in (None, f.concern)]
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
            where = f" in section {section!r}" if section is not None else ""
            hint = f" (did you mean {near[0].replace('-', '_')!r}?)" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}{where}{hint}")
        if flag.name not in given:
            arguments += _as_arguments(path, flag, key, value)
    return arguments


def _as_arguments(path: str, flag: _Flag, key: str, value: Any) -> list[str]:
    if value is None or value == flag.field.default:
        return [] if not flag.is_required else [f"{flag.name}={value}"]
    if flag.is_bool:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {key}: {value!r} is neither true nor false")
        return [flag.name if value else "--no-" + flag.name[2:]]
    if isinstance(value, list):
        return [flag.name, *map(str, value)]
    return [f"{flag.name}={value}"]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns tyro's framed error into a `ValueError` of one line, without the frame and the help text that follows."""
    text = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # a wrapped message could not be put together again
    try:
        with contextlib.redirect_stderr(text):
            yield
    except SystemExit:
        raise ValueError(_condense(text.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _condense(framed: str) -> str:
    lines = [line.strip("│| ") for line in framed.splitlines()[1:]]
    message: list[str] = []
    for line in lines:
        if line.startswith(("─", "╰", "-", "=")):
            break
        message.append(line)
    return " ".join(message).removeprefix("Error parsing ").strip()


def _print_help(
    by_name: Mapping[str, type[Any]], prog: str | None, description: str, example: str
) -> dict[str, Any]:
    parts = [description, f"Example: {example}" if example else ""]
    parts.append("--config FILE.yaml reads flags from a file; flags on the command line win.")
    text = "\n\n".join(part for part in parts if part)
    tyro.cli(
        _combined(by_name, tyro.conf.OmitArgPrefixes),
        prog=prog,
        description=text,
        args=["--help"],
        config=(tyro.conf.DisallowNone,),
    )
    raise AssertionError("--help exits")
