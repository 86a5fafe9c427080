"""Perplexity of a model, by the convention of `quant.text`."""

from __future__ import annotations

from collections.abc import Sequence

from quant.model import WeightSource
from quant.stream import log_likelihoods
from quant.text import Perplexity


def measure_perplexity(
    source: WeightSource, windows: Sequence[list[int]], *, progress: str | None = None
) -> Perplexity:
    """The model's perplexity on windows of at least 2 token ids each; of its weights, one block is in memory.

    Raises:
        NonFiniteError: it is NaN or infinite.
        ValueError: there is no window.
    """
    if not windows:
        raise ValueError("perplexity needs at least one window of 2 tokens")
    scores = log_likelihoods(source, windows, progress=progress)
    return Perplexity.from_sum(-sum(float(score.sum()) for score in scores), sum(len(score) for score in scores))
