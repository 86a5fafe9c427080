"""outliers.jsonl as people read it: outliers over the steps, and by layer in the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.evaluation import View
from trainer.figure import new_figure
from trainer.outliers import Site

TITLES: dict[Site, str] = {
    "residual": "residual stream",
    "qkv": "input of q, k, v",
    "o": "input of o",
    "gate_up": "input of gate, up",
    "down": "input of down",
}
MEASURES: dict[str, Callable[[list[float]], float]] = {"excess_kurtosis": fmean, "absmax": max}
"""What is drawn, and what the layers of a site come to over the steps."""

STYLES: dict[View, str] = {"in_context": "-", "single_tokens": ":"}


def plot_outliers(log: Path, picture: Path, title: str) -> None:
    """Draws outliers.jsonl as a PNG: excess kurtosis and absmax, over the steps and by layer after the last.

    Over the steps, a site's kurtosis is the mean over layers, its absmax the largest of any layer. Lines are in
    context, dotted ones of single tokens. Values that are not finite are left out, and so is 0 on the logarithmic axes.

    Raises:
        PlotUnavailableError: matplotlib is not installed.
        OSError: `log` cannot be read, or `picture` not written.
    """
    figure = new_figure(11, 7)
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, (measure, over_layers) in zip(axes, MEASURES.items(), strict=True):
        for number, (site, label) in enumerate(TITLES.items()):
            for view, style in STYLES.items():
                curve = [over_layers(_values(line, view, site, measure)) for line in lines]
                layers = _values(lines[-1], view, site, measure)
                settings = {"color": f"C{number}", "linestyle": style, "marker": "." if style == "-" else ""}
                row[0].plot(steps, curve, label=label if style == "-" else "", **settings)
                row[1].plot(range(len(layers)), layers, **settings)
        row[0].set(ylabel=measure.replace("_", " "), yscale="log")
    axes[0][0].set_title("over the steps", fontsize=10)
    axes[0][1].set_title(f"by layer after step {steps[-1]:,}", fontsize=10)
    axes[1][0].set_xlabel("step")
    axes[1][1].set_xlabel("layer")
    axes[1][1].xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].legend(fontsize=8)
    for part in axes.flat:
        part.grid(alpha=0.3)
    figure.suptitle(f"{title}  (dotted: single tokens)", fontsize=11)
    figure.savefig(picture, dpi=90)


def _values(line: Mapping[str, Any], view: View, site: Site, measure: str) -> list[float]:
    """A number for each layer; NaN, which is not drawn, for one that was not finite."""
    return [math.nan if value is None else value for value in line[view][site][measure]]
