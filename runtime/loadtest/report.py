"""The report of a load test: one page that needs nothing else, and the same figures as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runtime.loadtest.report_chart import Chart
from runtime.loadtest.report_numbers import Result, side_names
from runtime.loadtest.report_sections import sections
from runtime.loadtest.report_verdict import verdict

TEMPLATES = Path(__file__).parent
MARKDOWN_SIGNS = re.compile(r"([\\`*_\[\]<>|#~&])")


def write_report(result: Result, out: Path) -> None:
    """Writes report.html and report.md.

    Args:
        result: what `result.json` holds. Its texts may be anything: they are escaped.
        out: a directory that exists.

    Raises:
        KeyError: the result lacks what every result has.
        OSError: the directory cannot be written to.
    """
    (out / "report.html").write_text(to_html(result), encoding="utf-8")
    (out / "report.md").write_text(to_markdown(result), encoding="utf-8")


def to_html(result: Result) -> str:
    """The page: styles and charts inside it, no script, nothing fetched from anywhere."""
    environment = _environment(autoescape=True)
    environment.filters["svg"] = _svg
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))  # ours, and without a "<"
    return environment.get_template("report.html.jinja").render(_content(result), style=style)


def to_markdown(result: Result) -> str:
    """The same tables and sentences, without charts."""
    environment = _environment(finalize=_escape_markdown)
    environment.filters["fenced"] = _fenced
    return environment.get_template("report.md.jinja").render(_content(result))


def _environment(**escaping: Any) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **escaping,
    )


def _content(result: Result) -> dict[str, object]:
    names = side_names(result)
    return {
        "title": "Load test: " + " against ".join(names.values()),
        "names": names,
        "date": result["date"],
        "version": result["osp_version"],
        "valid": result["valid"],
        "reasons": result["invalid_reasons"],
        "verdict": verdict(result),
        "sections": sections(result),
    }


def _svg(chart: Chart) -> Markup:
    return Markup(chart.to_svg())  # the chart escapes every text


def _escape_markdown(value: object) -> object:
    """Every value that a template writes comes through here, and none can become markup."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return MARKDOWN_SIGNS.sub(r"\\\1", " ".join(value.splitlines()))


def _fenced(text: str) -> Markup:
    """A block of code whose fence the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{text}\n{fence}")
