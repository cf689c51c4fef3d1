"""The documentation's links lead somewhere, the design notes name only paths, tests and flags that exist, the README is
short, and the site's navigation has every page.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.config.command_line.flag_table import flags_of, with_dashes
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig
from tests.unit.docs.links import ROOT, anchors_of, broken_links, links_of

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.joinpath("docs").rglob("*.md"), *ROOT.joinpath(".github").rglob("*.md")]
)
DESIGN = sorted(ROOT.joinpath("docs", "design").glob("*.md"))
_FOLDERS = ("megatron_ext/", "tests/", "tools/", "examples/", "docs/", "benchmarks/")
_RUNS = (PerLayerRunConfig, NPTRunConfig, ProgressiveRunConfig)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=map(_name, PAGES))
def test_every_relative_link_and_anchor_leads_to_something_that_exists(page: Path) -> None:
    assert not broken_links(page)


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    tmp_path.joinpath("there.md").write_text("# A `code` heading, twice\n\n# A `code` heading, twice\n")
    page.write_text(
        "[good](../there.md#a-code-heading-twice-1) ![good](../there.md)\n"
        "[external](https://example.org/x) `[code](nowhere.md)` [mail](mailto:a@example.org)\n"
        "```\n[fenced](nowhere.md)\n```\n"
        "[gone](nowhere.md) [heading](../there.md#nothing) [own](#nothing) [out](../../x) [absolute](/x)\n"
        "[reference]: nowhere.md\n"
    )
    reasons = [text.rpartition(": ")[2] for text in broken_links(page, tmp_path)]
    assert reasons == [
        "does not exist",
        "has no such heading",
        "has no such heading",
        "leaves the repository",
        "is not relative",
        "does not exist",
    ]


def test_headings_become_the_anchors_that_github_makes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# What works, how well?\n## `--bf16` and *more*\n<a id="own"></a>\n```\n# no heading\n```\n'
    )
    assert anchors_of(page) == {"what-works-how-well", "--bf16-and-more", "own"}


def test_links_are_read_from_the_readme() -> None:
    # The checks above must not pass because nothing was found.
    assert len(list(links_of(ROOT / "README.md"))) > 10


@functools.cache
def _functions(path: Path) -> set[str]:
    """Names of the functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@functools.cache
def _flags() -> set[str]:
    """Every flag of the training scripts, aliases and negations included."""
    found = {"--dry-run"}
    for config in _RUNS:
        for flag in flags_of(config):
            found |= {*flag.names, *flag.negations}
    return found


def _quoted(page: Path) -> list[str]:
    """What stands in backticks in a page, fenced blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", DESIGN, ids=map(_name, DESIGN))
def test_every_path_test_and_flag_that_a_design_note_names_exists(page: Path) -> None:
    paths = [word for word in _quoted(page) if word.startswith(_FOLDERS)]
    assert paths
    missing = []
    for word in paths:
        name, _, function = word.partition("::")
        path = ROOT / name
        if not path.exists() or (function and function not in _functions(path)):
            missing.append(word)
    flags = {flag for word in _quoted(page) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", word)}
    missing += sorted(flag for flag in flags if with_dashes(flag) not in _flags())
    assert not missing


def test_the_design_notes_cover_the_five_documents() -> None:
    index = ROOT.joinpath("docs", "design", "README.md")
    linked = {link for _, link in links_of(index)}
    others = {page.name for page in DESIGN if page != index}
    assert len(others) == 5 and others <= linked


README = ROOT.joinpath("README.md").read_text(encoding="utf-8").splitlines()


def test_the_readme_has_at_most_110_lines_and_the_status_is_among_the_first_12() -> None:
    assert len(README) <= 110
    status = [line for line in README[:12] if line.startswith("> **Status:**")]
    assert status and "CPU" in status[0] and "not been exercised" in status[0]


def test_every_make_target_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(README)))
    assert {"install", "quickstart", "npt", "progressive", "test", "docs"} <= named
    targets = set(re.findall(r"^([a-z-]+):", ROOT.joinpath("Makefile").read_text(encoding="utf-8"), re.M))
    assert named <= targets


def _pages_of(navigation: Any) -> Iterator[str]:
    """The pages of mkdocs' navigation, whatever their depth."""
    if isinstance(navigation, str):
        yield navigation
        return
    for item in navigation.values() if isinstance(navigation, dict) else navigation:
        yield from _pages_of(item)


def test_the_sites_navigation_has_every_page_of_the_documentation_once() -> None:
    # BaseLoader: the file holds a tag that only mkdocs knows.
    settings = yaml.load(ROOT.joinpath("mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    pages = sorted(_pages_of(settings["nav"]))
    made_by_the_build = ["index.md", "project/changelog.md", "project/contributing.md"]
    docs = ROOT / "docs"
    assert pages == sorted(
        [*(str(path.relative_to(docs)) for path in docs.rglob("*.md")), *made_by_the_build]
    )
