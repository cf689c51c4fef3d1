"""Text is UTF-8 and a line ends at a line feed, whatever the locale and wherever the program reads or writes."""

import ast
from pathlib import Path

import pytest

from megatron_ext.config.command_line.flag_text import argument_text, read_lines

ROOT = Path(__file__).parents[3]
SOURCES = [*sorted(ROOT.glob("pretrain_*.py"))]
SOURCES += [
    path for name in ("megatron_ext", "tools", "examples") for path in sorted((ROOT / name).rglob("*.py"))
]


def _calls(path: Path) -> list[tuple[ast.Call, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            target = node.func
            name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
            found.append((node, name))
    return found


def _lacks_encoding(call: ast.Call, name: str) -> bool:
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":  # ours, with a path in front, writes UTF-8
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1
    is_builtin = isinstance(call.func, ast.Name)
    modes = [*call.args[1 if is_builtin else 0 :][:1], *(k.value for k in call.keywords if k.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    if name != "open" or not (is_builtin or texts):
        return False
    return not any(isinstance(text, str) and "b" in text for text in texts)


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        for call, name in _calls(path)
        if name in ("open", "read_text", "write_text") and _lacks_encoding(call, name)
    ]
    assert found == []


def test_nothing_is_layout_where_only_python_sees_a_line_end() -> None:
    found = [
        f"{path}:{call.lineno}" for path in SOURCES for call, name in _calls(path) if name == "splitlines"
    ]
    assert found == []


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\x0cc\u0085d\n\n  \r\nsecond é\r\nthird\x1c".encode())
    assert read_lines("--prompt-file", str(path)) == ["a\u2028b\x0cc\u0085d", "second é", "third\x1c"]
    path.write_bytes(b"good\nbad \xff\n")
    with pytest.raises(ValueError, match=r"--prompt-file .*prompts.txt: is not valid UTF-8 \(at byte 9\)"):
        read_lines("--prompt-file", str(path))


def test_an_argument_is_the_same_text_in_every_locale() -> None:
    for seen in ("é 漢", "é 漢".encode().decode("ascii", "surrogateescape")):
        assert argument_text("--prompt", seen) == "é 漢"
    with pytest.raises(ValueError, match="--prompt .*: is not valid UTF-8"):
        argument_text("--prompt", "\udcff")
