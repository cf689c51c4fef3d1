"""mkdocs' hook: puts the generated pages, the repository's own pages and the linked sources into the site."""

from pathlib import Path
from typing import Any

import api
import flags
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from repository_links import PAGES, ROOT, render_source, rewrite, source_page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes the generated pages and appends them to the navigation."""
    flag_pages, api_pages = flags.pages(), api.pages()
    config.extra["generated"] = {**flag_pages, **api_pages}
    reference: list[Any] = next(item["Reference"] for item in config.nav or [] if "Reference" in item)
    reference.append({"Flags": [{Path(place).stem: place} for place in flag_pages]})
    package = f"{api.PACKAGE}."
    reference.append({"Package": [{Path(place).stem.removeprefix(package): place} for place in api_pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, README, CONTRIBUTING and CHANGELOG, and the sources that any page links to."""
    for place, text in config.extra["generated"].items():
        files.append(File.generated(config, place, content=text))
    for file, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / file).read_text(encoding="utf-8")))
    waiting = {source for file in files.documentation_pages() for source in _rewritten(file)[1]}
    done: set[str] = set()
    while waiting:
        source = waiting.pop()
        done.add(source)
        text, more = render_source(source)
        files.append(File.generated(config, source_page(source), content=text))
        waiting |= more - done
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Changes a page's links to files of the repository; the first page needs no navigation beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return rewrite(markdown, _place_in_repository(page.file), page.file.src_uri)[0]


def _rewritten(file: File) -> tuple[str, set[str]]:
    return rewrite(file.content_string, _place_in_repository(file), file.src_uri)


def _place_in_repository(file: File) -> str:
    own = {place: path for path, place in PAGES.items()}
    return own.get(file.src_uri, f"docs/{file.src_uri}")
