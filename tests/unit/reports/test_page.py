"""A page escapes what it is given and needs nothing beside itself."""

from html.parser import HTMLParser

from megatron_ext.reports.page import Page

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class _Reader(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _read(page: Page) -> _Reader:
    reader = _Reader()
    reader.feed(page.html())
    return reader


def test_every_text_is_shown_as_it_is_and_none_becomes_a_tag() -> None:
    page = Page(EVIL)
    page.heading(EVIL)
    page.paragraph(EVIL)
    page.key_numbers([(EVIL, EVIL, EVIL)])
    page.table([EVIL], [[EVIL]])
    page.pictures([("<svg/>", EVIL)])
    page.beside([(EVIL, EVIL)])
    found = _read(page)
    assert found.texts.count(EVIL) == 12
    assert not {"script"} & {tag for tag, _ in found.tags}
    assert [attributes["alt"] for tag, attributes in found.tags if tag == "img"] == [EVIL]


def test_a_page_loads_nothing_and_forbids_scripts() -> None:
    page = Page("title")
    page.pictures([("<svg xmlns='http://www.w3.org/2000/svg'/>", "a picture")])
    found = _read(page)
    sources = [attributes["src"] or "" for tag, attributes in found.tags if "src" in attributes]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/svg+xml;base64,")
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe", "object")]
    assert "default-src 'none'" in page.html()


def test_numbers_in_tables_are_short_and_whole_ones_grouped() -> None:
    page = Page("title")
    page.table(["a"], [[1234567, 0.123456789, None, "1e9"]])
    assert {"1,234,567", "0.1235", "1e9"} <= set(_read(page).texts)


def test_a_list_of_the_sections_leads_to_each_of_them() -> None:
    page = Page("title", has_contents=True)
    for heading in ("Losses", EVIL):
        page.heading(heading)
    found = _read(page)
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in found.tags if tag == "h2"]
    assert len(set(links)) == 2
    assert found.texts.count(EVIL) == 2, "in the list and as a heading"
