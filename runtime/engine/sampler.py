"""Chooses the next token of one sequence from its row of logits.

A choice depends on the row, the `SamplingParams` and the position only: not on the batch, nor on what was drawn
before. The random stream is counter-based (Philox), keyed by (seed, position).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams


class LogitsError(FloatingPointError):
    """Logits that are no basis for a choice: a NaN, a positive infinity, or nothing but negative infinities."""


def sample(logits_V: NDArray[np.float32], sampling: SamplingParams, position: int) -> int:
    """The token at `position` of a sequence, prompt included in the count.

    Args:
        logits_V: float32 [V]. Negative infinity excludes a token.

    Raises:
        LogitsError: the logits are not usable.
    """
    highest = logits_V.max()
    if not np.isfinite(highest):  # the maximum of a row that holds a NaN is NaN
        raise LogitsError(f"the highest of the logits for position {position} is {highest}")
    if sampling.temperature == 0:
        return int(logits_V.argmax())  # the lowest id among equals
    probabilities_V = _softmax(logits_V, sampling.temperature)
    uniform = _uniform(sampling.seed, position)
    if sampling.top_p == 1:
        return _draw(probabilities_V, uniform)
    nucleus = _nucleus(probabilities_V, sampling.top_p)
    return int(nucleus[_draw(probabilities_V[nucleus], uniform)])


def _softmax(logits_V: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    # Subtracting first keeps the quotient <= 0: with a tiny temperature it overflows to -inf, whose exp is a true 0.
    with np.errstate(over="ignore"):
        weights_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
    probabilities_V: NDArray[np.float64] = weights_V / weights_V.sum()
    return probabilities_V


def _nucleus(probabilities_V: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The ids of the fewest tokens whose probability reaches `top_p`, likeliest first, the lower id among equals."""
    order = np.argsort(-probabilities_V, kind="stable")
    # Rounding may leave the total just below a top_p near 1; the slice then keeps every token.
    kept = int(np.searchsorted(probabilities_V[order].cumsum(), top_p)) + 1
    return order[:kept]


def _draw(weights: NDArray[np.float64], uniform: float) -> int:
    """The index whose share of the running sum `uniform` in [0, 1) falls into; never one of weight 0."""
    cumulative = weights.cumsum()
    total = cumulative[-1]
    target = min(uniform * total, np.nextafter(total, 0.0))  # the product may round up to the total
    return int(np.searchsorted(cumulative, target, side="right"))


def _uniform(seed: int, position: int) -> float:
    key = np.array([seed % 2**64, position], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
