"""Reference pages of the package: one for each folder, made by mkdocstrings from the docstrings."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_ext"


def pages() -> dict[str, str]:
    """The pages by their place in the site."""
    folders = [path.parent for path in sorted(ROOT.glob(f"{PACKAGE}/**/__init__.py"))]
    return {f"reference/api/{_dotted(folder)}.md": _page(folder) for folder in folders}


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _page(folder: Path) -> str:
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
    own = f"::: {_dotted(folder)}\n    options: {options}\n"
    parts = [f"# {_dotted(folder)}\n", own, *(f"::: {_dotted(module)}\n" for module in modules)]
    return "\n".join(parts)
