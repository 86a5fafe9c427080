"""Reads reports as a reader does: tables by their captions, figures as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

Tables = dict[str, dict[str, list[str]]]
"""Caption -> name of a row -> its other cells. The row "" is the head."""


@dataclass
class Element:
    """A start tag."""

    tag: str
    attributes: dict[str, str | None]


@dataclass
class Page(HTMLParser):
    """A page taken apart."""

    elements: list[Element] = field(default_factory=list)
    tables: Tables = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Texts by the tag that they stand in, that of a cell whole."""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._rows: list[list[str]] = []

    @classmethod
    def read(cls, html: str) -> Page:
        page = cls()
        page.feed(html)
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag in ("meta", "br", "hr"):
            return
        self._open.append(tag)
        if tag in ("p", "li", "figcaption", "caption", "code", "h1", "h2", "title"):
            self.texts.setdefault(tag, []).append("")
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "table":
            caption = self.texts["caption"][-1] if "caption" in self.texts else f"table {len(self.tables)}"
            self.tables[caption] = {row[0]: row[1:] for row in self._rows}
            self._rows = []

    def handle_data(self, data: str) -> None:
        for tag in reversed(self._open):
            if tag in ("th", "td"):
                self._rows[-1][-1] += data.rstrip("\n")
                return
            if tag in self.texts:
                self.texts[tag][-1] += data
                return


def markdown_tables(text: str) -> Tables:
    """The tables of a Markdown page, their captions in the line before with a colon."""
    tables: Tables = {}
    for caption, body in re.findall(r"^(\S.*):\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
        assert len({len(row) for row in rows}) == 1, "a cell has broken out of its row"
        cells = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row] for row in rows]
        tables[caption] = {row[0]: row[1:] for row in cells if not row[0].startswith("---")}
    return tables


def numbers(cell: str) -> list[float]:
    """All numbers in a cell."""
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", cell)]
