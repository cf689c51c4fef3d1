"""Relative links and anchors of Markdown files that lead nowhere; a pre-commit hook too, so it needs Python alone.

python tests/unit/docs/links.py README.md docs/npt.md
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[3]

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
_HTML_LINK = re.compile(r"(?:href|src)=\"([^\"]+)\"")
_HTML_ANCHOR = re.compile(r"(?:id|name)=\"([^\"]+)\"")
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
_EXTERNAL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*:|^//")


def broken_links(path: Path, root: Path = ROOT) -> list[str]:
    """The links of a Markdown file that lead to nothing, as `file:line: link: reason`.

    Args:
        path: the file.
        root: the repository; a link that leaves it is broken.
    """
    found = []
    for line, link in links_of(path):
        reason = _why_broken(link, path, root)
        if reason:
            found.append(f"{path.relative_to(root)}:{line}: {link}: {reason}")
    return found


def links_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line number and target of every link that is not external; code is left out."""
    for number, line in _prose(path):
        text = _CODE_SPAN.sub("", line)
        for pattern in (_LINK, _REFERENCE, _HTML_LINK):
            for link in pattern.findall(text):
                if not _EXTERNAL.match(link):
                    yield number, link


def anchors_of(path: Path) -> set[str]:
    """The anchors of a Markdown file: those GitHub makes from its headings, and those written in HTML."""
    anchors: set[str] = set()
    seen: Counter[str] = Counter()
    for _, line in _prose(path):
        anchors.update(_HTML_ANCHOR.findall(line))
        heading = _HEADING.match(line)
        if heading:
            slug = _slug(heading[1])
            anchors.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
            seen[slug] += 1
    return anchors


def _slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, no punctuation, dashes for spaces."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _why_broken(link: str, path: Path, root: Path) -> str | None:
    name, _, anchor = unquote(link).partition("#")
    if name.startswith("/"):
        return "is not relative"
    target = (path.parent / name).resolve() if name else path.resolve()
    if not target.is_relative_to(root.resolve()):
        return "leaves the repository"
    if not target.exists():
        return "does not exist"
    if anchor and target.suffix == ".md" and anchor not in anchors_of(target):
        return "has no such heading"
    return None


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the numbered lines of a file that are not in a fenced block."""
    fence = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence):
            fence = ""
        elif not fence:
            yield number, line


def main() -> int:
    """Prints the broken links of the files that are named; returns 1 if there is one."""
    broken = [text for name in sys.argv[1:] for text in broken_links(Path(name).resolve())]
    print("\n".join(broken), end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
