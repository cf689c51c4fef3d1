"""`make docs`: the site builds without a warning and holds what it generates, with links that lead somewhere."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from megatron_ext.config.command_line.flag_table import flags_of
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def _text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_flag_of_a_training_script_is_on_its_page_with_its_meaning(site: Path) -> None:
    text = _text(site / "reference" / "flags" / "pretrain_progressive.html")
    for flag in flags_of(ProgressiveRunConfig):
        assert all(name in text for name in flag.names), flag.name
    assert "Number of transformer layers." in text


def test_every_module_of_the_package_is_in_the_reference(site: Path) -> None:
    anchors = "".join(path.read_text(encoding="utf-8") for path in site.glob("reference/api/*.html"))
    for module in ROOT.glob("megatron_ext/**/*.py"):
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert f'"{name}"' in anchors or f"{name}.html" in anchors, name


def _local_targets(page: Path) -> Iterator[str]:
    content = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.S)
    assert content is not None, page
    for target in re.findall(r'(?:href|src)="([^"]+)"', content[0]):
        if not re.match(r"[a-z]+:|#", target):
            yield unquote(target.partition("#")[0])


def test_every_local_link_and_picture_of_a_page_is_in_the_site(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 60
    missing = [
        (page.name, to) for page in pages for to in _local_targets(page) if not (page.parent / to).exists()
    ]
    assert not missing
