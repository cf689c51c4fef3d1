"""Write a JSON-lines corpus of about 61 million tokens: the HTML manuals of Debian packages, as plain text.

    apt-get install $(python examples/gpt_per_layer/documentation_corpus.py --packages)
    python examples/gpt_per_layer/documentation_corpus.py --output train.jsonl --held-out held_out.jsonl

A document is one page of a manual; pages with equal text count once. No page is in both files.
"""

import argparse
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

PACKAGES = (
    "cppreference-doc-en-html",
    "debian-reference-en",
    "developers-reference",
    "git-doc",
    "libboost1.74-doc",
    "linux-doc-6.1",
    "openjdk-17-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python-pandas-doc",
    "python-scipy-doc",
    "python3.11-doc",
    "sqlite3-doc",
)
HELD_OUT = 0.005
"""Expected share of the pages that is held out."""

_NO_TEXT = re.compile(r"<(head|script|style|nav|header|footer|svg)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(
    r"</?(p|div|li|h\d|tr|dt|dd|pre|table|ul|ol|dl|section)\b[^>]*>|<br\b[^>]*>", re.IGNORECASE
)
_TAG = re.compile(r"<[^>]*>")
_BLANK_LINES = re.compile(r"\s*\n\s*\n\s*")


def pages(package: str) -> Iterator[tuple[str, str]]:
    """Yields the path and the HTML of every page of an installed package."""
    listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise ValueError(f"package {package}: not installed; run apt-get install {package}")
    for name in sorted(set(listing.stdout.split("\n"))):
        path = Path(name)
        if path.suffix in (".html", ".htm") and path.is_file():
            yield name, path.read_text(encoding="utf-8", errors="replace")


def text_of(page: str) -> str:
    """Returns the text of a page of HTML."""
    page = _BREAK.sub("\n", _NO_TEXT.sub("", page))
    return _BLANK_LINES.sub("\n\n", html.unescape(_TAG.sub("", page))).strip()


def write(output: Path, held_out: Path) -> None:
    """Writes both files, and prints how much text each has."""
    seen, counts = set[bytes](), {output: [0, 0], held_out: [0, 0]}
    with output.open("w", encoding="utf-8") as train, held_out.open("w", encoding="utf-8") as other:
        for package in PACKAGES:
            for name, page in pages(package):
                text = text_of(page)
                key = sha256(text.encode()).digest()
                if key in seen or not text:
                    continue
                seen.add(key)
                is_held_out = int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64 < HELD_OUT
                json.dump({"text": text}, other if is_held_out else train, ensure_ascii=False)
                (other if is_held_out else train).write("\n")
                count = counts[held_out if is_held_out else output]
                count[0] += 1
                count[1] += len(text.encode())
    for path, (documents, size) in counts.items():
        print(f"{path}: {documents:,} documents, {size:,} bytes of text")


def main() -> None:
    """Writes the corpus, or prints the names of the packages."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", action="store_true", help="print the names of the packages, and write nothing"
    )
    parser.add_argument("--output", type=Path, help="training file to write")
    parser.add_argument("--held-out", type=Path, help="held-out file to write")
    flags = parser.parse_args()
    if flags.packages:
        print(*PACKAGES)
    elif flags.output is None or flags.held_out is None:
        parser.error("--output and --held-out: both are required")
    else:
        write(flags.output, flags.held_out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
