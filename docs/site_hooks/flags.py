"""Reference pages of the command line: every flag of every command, read from the dataclasses that define the flags."""

import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.flag_table import Flag, flags_of, groups_of
from megatron_ext.config.command_line.help_text import field_docs

ROOT = Path(__file__).parents[2]
TRAINING = ("pretrain_gpt_per_layer.py", "pretrain_npt.py", "pretrain_progressive.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The arguments with which a command calls `parse`."""

    name: str
    config_type: type[Any]
    description: str
    example: str
    supplied: Mapping[str, str]


class _Parsed(Exception):
    """Stops a command where it would read its command line."""


def pages() -> dict[str, str]:
    """The pages by their place in the site: one for each training command, one for all tools."""
    built = {f"reference/flags/{Path(name).stem}.md": _page(command(name)) for name in TRAINING}
    tools = [
        command(f"tools/{name}") for path in sorted(ROOT.glob("tools/*.py")) for name in _commands_of(path)
    ]
    built["reference/flags/tools.md"] = "# Flags of the tools\n\n" + "\n".join(map(_section, tools))
    return built


def command(name: str) -> Command:
    """Runs a script's `main` up to its call of `parse` and returns the arguments of that call.

    Args:
        name: the script's path in the repository, then its subcommand if it has one.
    """
    script, *subcommand = name.split()
    module = _load(ROOT / script)

    def capture(config_type: type[Any], *_: Any, **options: Any) -> None:
        shown = {key: options.get(key, "") for key in ("description", "example")}
        supplied = options.get("supplied", {})
        raise _Parsed(Command(name=name, config_type=config_type, supplied=supplied, **shown))

    module.parse = capture
    argv, sys.argv = sys.argv, [script, *subcommand]
    try:
        module.main()
    except _Parsed as parsed:
        found: Command = parsed.args[0]
        return found
    finally:
        sys.argv = argv
    raise RuntimeError(f"{name} reads no command line")


def _load(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def _commands_of(path: Path) -> list[str]:
    """The commands of a tool: its subcommands, or the tool itself; none if its flags are another package's."""
    if not hasattr(_load(path), "parse"):
        return []
    subcommands = getattr(_load(path), "_COMMANDS", None)
    return [f"{path.name} {name}" for name in subcommands] if subcommands else [path.name]


def _page(shown: Command) -> str:
    parts = [f"# Flags of {shown.name}\n", _head(shown)]
    for name, group in groups_of(shown.config_type).items():
        summary = inspect.cleandoc(group.__doc__ or "").partition("\n\n")[0]
        parts.append(f"## {name}\n\n{summary}\n\n{_table(shown, name)}")
    return "\n".join(parts)


def _section(shown: Command) -> str:
    tables = [_table(shown, name) for name in groups_of(shown.config_type)]
    return "\n".join([f"## {shown.name}\n", _head(shown), *tables])


def _head(shown: Command) -> str:
    # One flag per line; torchrun's own stays on the first.
    example = re.sub(r" (?=--(?!nproc-per-node)[a-z])", r" \\\n    ", " ".join(shown.example.split()))
    return f"{inspect.cleandoc(shown.description)}\n\n```bash\n{example}\n```\n"


def _table(shown: Command, group: str) -> str:
    meanings = field_docs(groups_of(shown.config_type)[group])
    flags = [flag for flag in flags_of(shown.config_type) if flag.group == group]
    rows = [_row(flag, meanings.get(flag.field, ""), shown.supplied.get(flag.field)) for flag in flags]
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows, ""])


def _row(flag: Flag, meaning: str, supplied: str | None) -> str:
    names = "<br>".join(f"`{name}`" for name in (*flag.names, *flag.negations[:1]))
    choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
    default = supplied or _default(flag)
    return f"| {names} | {_cell(default)} | {_cell(' '.join(meaning.split()) + choices)} |"


def _default(flag: Flag) -> str:
    if flag.is_required:
        return "required"
    values = flag.default if isinstance(flag.default, (tuple, list)) else (flag.default,)
    text = " ".join(str(value) for value in values if value is not None)
    return f"`{text}`" if text else "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
