"""Reference pages of the command line: every flag of every command, read from the dataclasses that define the flags."""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import re
import sys
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.flag_table import Flag, flags_of

ROOT = Path(__file__).parents[2]
TRAINING = ("pretrain_gpt_per_layer.py", "pretrain_npt.py", "pretrain_progressive.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What a command hands to the parser."""

    name: str
    groups: dict[str, type[Any]]
    description: str
    example: str


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

    def capture(groups: Any, *_: Any, description: str = "", example: str = "", **__: Any) -> None:
        by_name = {"flags": groups} if isinstance(groups, type) else dict(groups)
        raise _Parsed(Command(name=name, groups=by_name, description=description, example=example))

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
    """The commands of a tool: its subcommands, or the tool itself."""
    subcommands = getattr(_load(path), "_COMMANDS", None)
    return [f"{path.name} {name}" for name in subcommands] if subcommands else [path.name]


def _page(shown: Command) -> str:
    return f"# Flags of {shown.name}\n\n{_head(shown)}\n" + "\n".join(
        f"## {group}\n\n{_intro(config)}\n\n{_table({group: config})}"
        for group, config in shown.groups.items()
    )


def _section(shown: Command) -> str:
    return f"## {shown.name}\n\n{_head(shown)}\n{_table(shown.groups)}"


def _head(shown: Command) -> str:
    # One flag per line; torchrun's own stay beside it.
    example = re.sub(r" (?=--(?!nproc-per-node)[a-z])", " \\\\\n    ", " ".join(shown.example.split()))
    return f"{inspect.cleandoc(shown.description)}\n\n```bash\n{example}\n```\n"


def _intro(config: type[Any]) -> str:
    return inspect.cleandoc(config.__doc__ or "").partition("\n\n")[0]


def _table(groups: dict[str, type[Any]]) -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    meanings = {name: _field_texts(config) for name, config in groups.items()}
    rows += [_row(flag, groups[flag.group], meanings[flag.group]) for flag in flags_of(groups)]
    return "\n".join(rows) + "\n"


def _row(flag: Flag, config: type[Any], meanings: dict[str, str]) -> str:
    field = flag.name[2:].replace("-", "_")
    names = "<br>".join(f"`{name}`" for name in (*flag.names, *flag.negations[:1]))
    choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
    meaning = " ".join(meanings.get(field, "").split()) + choices
    return f"| {names} | {_default(config, field, flag)} | {_cell(meaning)} |"


def _default(config: type[Any], field: str, flag: Flag) -> str:
    if flag.is_required:
        return "required"
    described = config.__dataclass_fields__[field]
    value = described.default
    if value is dataclasses.MISSING:
        value = described.default_factory()
    if value is None or value == ():
        return "none"
    text = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return f"`{_cell(text)}`" if text else "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _field_texts(config: type[Any]) -> dict[str, str]:
    """Field -> the string below it, of a dataclass and what it inherits."""
    texts: dict[str, str] = {}
    for ancestor in reversed(inspect.getmro(config)[:-1]):
        definition = ast.parse(inspect.cleandoc(inspect.getsource(ancestor))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                texts[ast.unparse(statement.target)] = str(ast.literal_eval(following.value))
    return texts
