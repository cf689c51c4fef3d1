"""The root of the repository holds only what a stranger expects there."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone: which files belong to it is unknown")
def test_the_root_holds_only_what_a_stranger_expects_there() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert found == {
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
        *(
            "Dockerfile",
            "Dockerfile.cuda",
            "Makefile",
            "constraints.txt",
            "mkdocs.yml",
            "pyproject.toml",
            "setup.py",
        ),
        *("pretrain_gpt_per_layer.py", "pretrain_npt.py", "pretrain_progressive.py"),
        *("megatron_ext", "tools", "examples", "benchmarks", "tests", "docs"),
    }
