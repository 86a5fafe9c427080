"""The report can be shown anywhere: nothing in a result becomes markup, the page fetches nothing, all can read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from report_reader import Page, markdown_tables
from report_result import comparison

from runtime.loadtest.report import to_html, to_markdown, write_report

HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(2)>|`*_[a](http://evil.example)\n# & </style>"""


@pytest.fixture
def result() -> dict[str, Any]:
    return comparison()


def hostile(value: Any) -> Any:
    """Every text of a result replaced."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_becomes_markup_on_the_page(result: dict[str, Any]) -> None:
    result |= {"valid": False, "invalid_reasons": ["one"]}
    expected = {element.tag for element in Page.read(to_html(result)).elements}
    page = Page.read(to_html(hostile(result)))
    assert {element.tag for element in page.elements} == expected
    assert not expected & {"script", "img", "iframe", "link", "a"}
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert page.texts["li"][0] == HOSTILE
    assert page.tables["The machine"]["cpu"] == [HOSTILE]


def test_no_text_becomes_markup_in_markdown(result: dict[str, Any]) -> None:
    result |= {"valid": False, "invalid_reasons": ["one"]}
    tables = markdown_tables(to_markdown(hostile(result)))  # which sees that no cell breaks out of its row
    assert tables["The machine"]["cpu"] == [" ".join(HOSTILE.splitlines())]


def test_a_markdown_renderer_sees_the_same_tables(result: dict[str, Any]) -> None:
    renderer = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    result |= {"valid": False, "invalid_reasons": ["one"]}
    render = renderer.MarkdownIt("commonmark").enable("table").render  # raw HTML would pass through
    plain, changed = (Page.read(render(to_markdown(given))) for given in (result, hostile(result)))
    assert [element.tag for element in changed.elements] == [element.tag for element in plain.elements]
    assert len([element for element in plain.elements if element.tag == "table"]) == 10


def test_the_page_fetches_nothing(result: dict[str, Any]) -> None:
    html = to_html(result)
    page = Page.read(html)
    names = {name for element in page.elements for name in element.attributes}
    assert not names & {"src", "href", "srcset", "action", "style", "data", "poster", "background"}
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policies = [element.attributes.get("content") for element in page.elements if element.tag == "meta"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies


def test_drawings_are_xml_and_say_what_they_show(result: dict[str, Any]) -> None:
    html = to_html(hostile(result))
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    charts = [svg for svg in drawings if svg.get("role") == "img"]
    assert len(charts) == 4
    for svg in charts:
        title, description = svg.find("title"), svg.find("desc")
        assert title is not None
        assert title.text
        assert description is not None
        assert "table" in (description.text or "")
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_samples_do_not_bloat_the_page(result: dict[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for repeat in result["A"]["repeats"]:
        repeat["samples"]["itl_ms"] = random.lognormal(3, 1, 100_000).tolist()
    write_report(result, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 100_000
    assert (tmp_path / "report.md").read_text("utf-8") == to_markdown(result)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_texts_and_curves_stand_out_from_the_page(result: dict[str, Any], mode: int) -> None:
    colours = dict(
        re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", to_html(result), re.DOTALL)[mode])
    )
    pairs = [(ink, page) for ink in ("ink", "muted", "a", "b") for page in ("page", "panel")]
    for ink, page in [*pairs, ("alarm", "alarm-page")]:
        low, high = sorted((luminance(colours[ink]), luminance(colours[page])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, page)
