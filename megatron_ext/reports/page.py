"""Builds a self-contained HTML page: pictures are embedded, there are no scripts or requests, so it opens offline.

All text is escaped, and the page's security policy forbids scripts and requests, so text that a model generated cannot
run.
"""

import base64
import html
from collections.abc import Sequence

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #e5e5e5; }
th { text-align: left; font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.numbers div { border: 1px solid #ddd; border-radius: .4rem; padding: .6rem .9rem; min-width: 8rem; }
.numbers b { display: block; font-size: 1.35rem; } .numbers small { color: #666; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1rem; }
.columns img { width: 100%; }
figure { margin: .5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; font-size: .85rem; }
nav ul { columns: 3; list-style: none; padding: 0; margin: .6rem 0; } nav a { color: #0b5394; }
.beside { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .3rem 0; }
"""


class Page:
    """Collects the parts of a page from top to bottom.

    Args:
        title: title of the page.
        has_contents: put a linked list of the sections below the title.
    """

    def __init__(self, title: str, *, has_contents: bool = False) -> None:
        self._title = html.escape(title)
        self._has_contents = has_contents
        self._headings: list[str] = []
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._headings.append(html.escape(text))
        self._parts.append(f'<h2 id="section-{len(self._headings)}">{self._headings[-1]}</h2>')

    def paragraph(self, text: str) -> None:
        """Adds a paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def key_numbers(self, numbers: Sequence[tuple[str, str, str]]) -> None:
        """Adds the main figures side by side, each a (label, value, remark); the remark may be empty."""
        boxes = "".join(
            f"<div>{html.escape(label)}<b>{html.escape(value)}</b><small>{html.escape(remark)}</small></div>"
            for label, value, remark in numbers
        )
        self._parts.append(f'<div class="numbers">{boxes}</div>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> None:
        """Adds a table; floats are written with four significant digits, None as an empty cell."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def pictures(self, pictures: Sequence[tuple[str, str]], *, in_columns: bool = False) -> None:
        """Adds pictures side by side.

        Args:
            pictures: (SVG text, caption) of each.
            in_columns: scale all pictures to two columns; otherwise each keeps its own size.
        """
        figures = "".join(_figure(svg, caption) for svg, caption in pictures)
        self._parts.append(f'<div class="{"columns" if in_columns else "pictures"}">{figures}</div>')

    def beside(self, texts: Sequence[tuple[str, str]]) -> None:
        """Adds longer texts side by side for comparison, each a (label, text); line breaks are kept."""
        columns = "".join(
            f"<div><b>{html.escape(label)}</b><pre>{html.escape(text)}</pre></div>" for label, text in texts
        )
        self._parts.append(f'<div class="beside">{columns}</div>')

    def html(self) -> str:
        """Returns the whole page as text."""
        contents = [_contents(self._headings)] if self._has_contents else []
        body = "\n".join([f"<h1>{self._title}</h1>", *contents, *self._parts])
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{self._title}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )


def _contents(headings: Sequence[str]) -> str:
    links = (
        f'<li><a href="#section-{number}">{text}</a></li>' for number, text in enumerate(headings, start=1)
    )
    return f"<nav><ul>{''.join(links)}</ul></nav>"


def _cell(value: str | int | float | None) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{value:,d}</td>' if isinstance(value, int) else _decimal(value)
    return f"<td>{html.escape('' if value is None else str(value))}</td>"


def _decimal(value: float) -> str:
    return f'<td class="number">{value:.4g}</td>'


def _figure(svg: str, caption: str) -> str:
    # An <img> instead of inline SVG: the browser runs nothing in it, and ids of two pictures cannot clash.
    data = base64.b64encode(svg.encode()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
