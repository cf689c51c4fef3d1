"""The files beside the code are well formed and agree with it: citation, templates, hooks, containers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _project() -> Any:
    """The metadata in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_file_names_the_packages_version_and_license() -> None:
    citation = _yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == _project()["version"]
    assert citation["license"] == _project()["license"]


def test_every_issue_form_parses_and_its_fields_have_names_of_their_own() -> None:
    forms = sorted(path for path in TEMPLATES.glob("*.yml") if path.name != "config.yml")
    assert forms
    for path in forms:
        form = _yaml(path)
        assert {"name", "description", "body"} <= form.keys(), path.name
        ids = [item["id"] for item in form["body"]]
        assert len(ids) == len(set(ids)), path.name
        for item in form["body"]:
            assert item["type"] in {"textarea", "input", "dropdown"}, path.name
            assert item["attributes"]["label"], path.name
    assert isinstance(_yaml(TEMPLATES / "config.yml")["blank_issues_enabled"], bool)


def test_a_bug_report_must_give_command_versions_and_dry_run() -> None:
    required = {
        item["id"]
        for item in _yaml(TEMPLATES / "bug_report.yml")["body"]
        if item.get("validations", {}).get("required")
    }
    assert {"command", "versions", "dry_run"} <= required


def test_the_hooks_use_the_ruff_that_ci_uses() -> None:
    hooks = [hook for repo in _yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = re.search(r"^ruff==\S+", ROOT.joinpath("constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned is not None
    used = {
        dependency
        for hook in hooks
        for dependency in hook.get("additional_dependencies", [])
        if dependency.startswith("ruff")
    }
    assert used == {pinned[0]}


def test_what_a_hook_runs_from_the_repository_exists() -> None:
    hooks = [hook for repo in _yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    scripts = [word for hook in hooks for word in hook["entry"].split() if word.endswith(".py")]
    assert scripts and all(ROOT.joinpath(script).is_file() for script in scripts)


def test_the_development_container_builds_a_stage_of_the_dockerfile() -> None:
    path = ROOT / ".devcontainer" / "devcontainer.json"
    build = json.loads(path.read_text(encoding="utf-8"))["build"]
    dockerfile = (path.parent / build["dockerfile"]).resolve()
    assert (path.parent / build["context"]).resolve() == ROOT
    assert f" AS {build['target']}\n" in dockerfile.read_text(encoding="utf-8")


def test_the_images_install_extras_of_the_package_on_a_python_it_supports() -> None:
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = ROOT.joinpath(name).read_text(encoding="utf-8")
        extras = re.search(r'^ARG EXTRAS="([^"]+)"', text, re.M)
        assert (
            extras is not None and set(extras[1].split(",")) <= _project()["optional-dependencies"].keys()
        ), name
        minor = re.search(r"^FROM python:3\.(\d+)-", text, re.M)
        assert minor is not None
        assert f"Programming Language :: Python :: 3.{minor[1]}" in _project()["classifiers"]


def test_every_direct_dependency_of_what_ci_installs_is_pinned() -> None:
    project = _project()
    extras = re.search(r"^EXTRAS := (\S+)", ROOT.joinpath("Makefile").read_text(encoding="utf-8"), re.M)
    assert extras is not None
    wanted = [*project["dependencies"]]
    for extra in extras[1].split(","):
        wanted += project["optional-dependencies"][extra]
    names = {re.match(r"[\w-]+", text)[0] for text in wanted}  # type: ignore[index]
    constraints = ROOT.joinpath("constraints.txt").read_text(encoding="utf-8")
    assert names <= set(re.findall(r"^([\w-]+)==", constraints, re.M))


def test_the_changelog_has_a_section_for_the_packages_version_or_unreleased_changes() -> None:
    sections = re.findall(r"^## \[?([\w.]+)", ROOT.joinpath("CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sections[0] in ("Unreleased", _project()["version"])
