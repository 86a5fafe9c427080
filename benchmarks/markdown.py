"""The tables of `benchmarks.quantization` in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import Row, Table

NOT_MEASURED = "not measured"
TIMES = "\N{MULTIPLICATION SIGN}"


def perplexity_cell(perplexity: float | None, perplexity_16bit: float) -> str:
    """Perplexity and its ratio to the model's own: "38.06 (1.272 ×)". None is one that is infinite or NaN."""
    if perplexity is None:
        return "diverges: not finite"
    ratio = perplexity / perplexity_16bit
    return f"{_short(perplexity, '.2f')} ({_short(ratio, '.3f')} {TIMES})"


def task_cell(result: Mapping[str, Any], key: str) -> str:
    """The share under `key` in percent, with its standard error: "42.0 ± 5.0". None is that of a model
    whose scores are not finite.
    """
    if result[key] is None:
        return "diverges: not finite"
    error = result[f"{key}_stderr"]
    return f"{100 * result[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def perplexity_table(table: Table, perplexities: Mapping[str, float | None], perplexity_16bit: float) -> str:
    """A table of perplexities, which are given by the names of rows."""

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return perplexity_cell(perplexities[row.name], perplexity_16bit) if row.name in perplexities else NOT_MEASURED

    lines = {label: [cell(row) for row in line] for label, line in table.lines.items()}
    return section(table.title, table.note, table.columns, lines)


def section(title: str, note: str, columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    """A heading, a note, and a table with a line for every label."""
    grid = [list(columns), ["---"] * len(columns), *([label, *cells] for label, cells in lines.items())]
    return "\n".join([f"### {title}", "", note, "", *(f"| {' | '.join(cells)} |" for cells in grid), ""])


def _short(value: float, form: str) -> str:
    """In the given form while there are few digits before the point; "1.2e12" beyond."""
    if value < 1e4:
        return format(value, form)
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"
