"""Links of a page to other files of the repository: in the site they lead to pages that show those files."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Files outside docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
_LINK = re.compile(r"(\]\(|(?:src|href)=\")([^()\s\"#:]+)(#[^()\s\"]*)?(?=[)\"])")
_LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".sbatch": "bash",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
}


def rewrite(markdown: str, file: str, page: str) -> tuple[str, set[str]]:
    """Returns the text of a page with its links changed, and the repository files that it now shows as sources.

    Args:
        markdown: the text.
        file: where it is in the repository.
        page: where it is in the site's sources.
    """
    sources: set[str] = set()

    def place(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), match[2]))
        if not (ROOT / target).exists():
            return match[0]
        if target in PAGES:
            new = PAGES[target]
        elif target.startswith("docs/") and (ROOT / target).is_file():
            new = target.removeprefix("docs/")
        elif target == "docs/design":
            new = "design/README.md"
        else:
            sources.add(target)
            new = source_page(target)
        return match[1] + posixpath.relpath(new, posixpath.dirname(page) or ".") + (match[3] or "")

    return _LINK.sub(place, markdown), sources


def source_page(path: str) -> str:
    """The page that shows a file or lists a folder of the repository."""
    return f"source/{path}.md"


def render_source(path: str) -> tuple[str, set[str]]:
    """Returns the text of the page of a file or folder, and the sources that it links to."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    where = ROOT / path
    if where.is_dir():
        names = sorted(child.name for child in where.iterdir() if child.is_file())
        listing = "\n".join(f"- [{name}]({posixpath.basename(path)}/{name}.md)" for name in names)
        return head + listing + "\n", {f"{path}/{name}" for name in names}
    text = where.read_text(encoding="utf-8")
    return f"{head}````{_LANGUAGES.get(where.suffix, 'text')}\n{text}\n````\n", set()
