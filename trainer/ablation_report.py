"""An ablation as people read it: one table, and one plot in the paper's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import Recipe
from trainer.figure import new_figure

TITLES: dict[Recipe, str] = {
    "adam": "Adam",
    "muon-only": "Muon without Adam",
    "muon": "Muon",
    "muon+ssnorm": "Muon + SSNorm",
    "muon+embproj": "Muon + EmbProj",
    "osp": "OSP (all)",
}
"""The recipes as the paper calls them, in its order."""

PUBLISHED_KURTOSIS: dict[Recipe, float] = {
    "adam": 1818.56,
    "muon-only": 361.35,
    "muon": 1575.12,
    "muon+ssnorm": 66.69,
    "muon+embproj": 703.23,
    "osp": 0.04,
}
"""Excess kurtosis after 100 billion tokens, 1.4 billion parameters (arXiv 2506.19697, the ablation)."""

HEADINGS = (
    "recipe", "held-out loss", "excess kurtosis: the paper's", "here, single tokens", "here, in context",
    "perplexity: 16-16-16", "4-4-4", "4-4-4, FFN Hadamard", "4-4-4, per channel and token",
)  # fmt: skip


def as_markdown(result: Mapping[str, Any]) -> str:
    """A line with the settings, and the table of what `Ablation.run` returns; recipes to come are left out."""
    settings, model = result["settings"], result["settings"]["model"]
    size = f"{model['num_layers']} layers of width {model['hidden_size']}, {model['vocab_size']:,} tokens"
    length = f"{settings['steps']:,} steps of {settings['batch_tokens']:,} tokens, seed {settings['seed']}"
    rows = [HEADINGS, ("---", *("--:" for _ in HEADINGS[1:]))]
    rows += [_row(recipe, result["recipes"][recipe]) for recipe in TITLES if recipe in result["recipes"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{size} of vocabulary; {length}.\n\n{table}\n"


def _row(recipe: Recipe, measured: Mapping[str, Any]) -> tuple[str, ...]:
    kurtosis, perplexity, ratio = measured["excess_kurtosis"], measured["perplexity"], measured["ratio"]
    return (
        TITLES[recipe],
        f"{measured['held_out_loss']:.4f}",
        f"{PUBLISHED_KURTOSIS[recipe]:,.2f}",
        _number(kurtosis["single_tokens"]),
        _number(kurtosis["in_context"]),
        _number(perplexity["16-bit"]),
        *(_quantized(perplexity[form], ratio[form]) for form in ("w4a4", "w4a4-ffn", "w4a4-token")),
    )


def _number(value: float) -> str:
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _quantized(perplexity: float | None, ratio: float | None) -> str:
    if perplexity is None or ratio is None:
        return "not finite"
    return f"{_number(perplexity)} ({ratio:.3f} x)"


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Writes a PNG: excess kurtosis over the steps, and what 4 bits do to perplexity.

    Raises:
        PlotUnavailableError: matplotlib is not installed.
    """
    figure = new_figure(11, 4.4)
    curves, bars = figure.subplots(1, 2)
    recipes = [recipe for recipe in TITLES if recipe in result["recipes"]]
    for number, recipe in enumerate(recipes):
        measured, color = result["recipes"][recipe], f"C{number}"
        steps = [step for step, _ in measured["curve"]]
        kurtosis = [_drawn(value) for _, value in measured["curve"]]
        curves.plot(steps, kurtosis, marker=".", label=TITLES[recipe], color=color)
        for offset, form, hatch in ((-0.2, "w4a4", ""), (0.2, "w4a4-ffn", "///")):
            rise = _drawn(measured["ratio"][form]) - 1
            bars.bar(number + offset, rise, 0.36, bottom=1, color=color, edgecolor="white", hatch=hatch)
    curves.set(xlabel="step", ylabel="excess kurtosis of the residual stream", yscale="log")
    curves.legend(fontsize=8)
    bars.set(ylabel="perplexity at 4-4-4 over that at 16-16-16")
    bars.set_title("hatched: with FFN Hadamard", fontsize=9)
    bars.set_xticks(range(len(recipes)), [TITLES[recipe] for recipe in recipes], rotation=25, ha="right", fontsize=8)
    for axes in (curves, bars):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(file, dpi=110)


def _drawn(value: float | None) -> float:
    """What matplotlib leaves out, where a value is not finite."""
    return math.nan if value is None else value
