"""Draws from the distribution of a row of logits, narrowed by top_k, min_p and top_p.

Written for large vocabularies: a row is scanned a few times and never sorted, nor summed number by number.
Letters: V the vocabulary, C the tokens that are still in question.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams
from runtime.engine.top_k import largest
from runtime.engine.workspace import Workspace

_BINS = 1024
_RUN = 256


def draw(
    logits_V: NDArray[np.float32], highest: np.float32, sampling: SamplingParams, uniform: float, work: Workspace
) -> int:
    """The token that `uniform`, in [0, 1), falls on.

    min_p compares with the likeliest token, which top_k never removes. So it does not matter which of the two comes
    first, and the cheaper one does; top_p goes by what both have left.

    Args:
        logits_V: float32 [V]; `highest`, their maximum, is finite.
    """
    ids_C = largest(logits_V, sampling.top_k) if 0 < sampling.top_k < len(logits_V) else None
    logits_C = logits_V if ids_C is None else logits_V[ids_C]
    weights_C = _weights(logits_C, highest, sampling.temperature, work)  # of the likeliest, 1
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights_C >= np.float32(sampling.min_p))
        ids_C, logits_C, weights_C = _narrowed(ids_C, kept), logits_C[kept], weights_C[kept]
    if sampling.top_p < 1:
        kept = _nucleus(logits_C, weights_C, sampling.top_p, work)
        ids_C, weights_C = _narrowed(ids_C, kept), weights_C[kept]
    place = _place(weights_C, uniform, work)
    return place if ids_C is None else int(ids_C[place])


def _narrowed(ids_C: NDArray[np.intp] | None, kept: NDArray[np.intp]) -> NDArray[np.intp]:
    return kept if ids_C is None else ids_C[kept]


def _weights(
    logits_C: NDArray[np.float32], highest: np.float32, temperature: float, work: Workspace
) -> NDArray[np.float32]:
    """`exp((logits - highest) / temperature)`; the quotient is float64, for temperatures beyond float32's range."""
    scaled_C, weights_C = work.sums_V[: len(logits_C)], work.weights_V[: len(logits_C)]
    np.subtract(logits_C, np.float64(highest), out=scaled_C)
    with np.errstate(over="ignore"):  # of a tiny temperature, minus infinity, whose exponential is a true 0
        np.divide(scaled_C, temperature, out=scaled_C)
        weights_C[:] = scaled_C
    return np.exp(weights_C, out=weights_C)


def _nucleus(
    logits_C: NDArray[np.float32], weights_C: NDArray[np.float32], top_p: float, work: Workspace
) -> NDArray[np.intp]:
    """The places of the fewest tokens whose probability reaches `top_p`; of equals, the lower id comes first.

    The likeliest belong to it, down to some logit. That logit is found in two steps, first among bins of logits, and
    then by sorting the one bin that it lies in.
    """
    total = _sum(weights_C, work)
    wanted = top_p * total
    # All tokens rarer than (1 - top_p) / C make up less than 1 - top_p together. Half of it leaves room for rounding.
    places = np.flatnonzero(weights_C >= 0.5 * (1 - top_p) * total / len(weights_C))
    logits_P, weights_P = logits_C[places].astype(np.float64), weights_C[places]
    depths_P = logits_P.max() - logits_P
    bins_P = (depths_P * ((_BINS - 1) / (depths_P.max() or 1.0))).astype(np.intp)
    reached = np.bincount(bins_P, weights_P, _BINS).cumsum()
    edge = int(np.searchsorted(reached, wanted))
    kept_P = bins_P < edge
    at_edge = np.flatnonzero(bins_P == edge)
    order = at_edge[np.argsort(depths_P[at_edge], kind="stable")]
    before = reached[edge - 1] if edge else 0.0
    # Rounding may leave the sum just below what is wanted; the slice then keeps the whole bin.
    count = int(np.searchsorted(weights_P[order].cumsum(dtype=np.float64), wanted - before)) + 1
    kept_P[order[:count]] = True
    nucleus: NDArray[np.intp] = places[kept_P]
    return nucleus


def _sum(weights_C: NDArray[np.float32], work: Workspace) -> float:
    sums_C = work.sums_V[: len(weights_C)]
    sums_C[:] = weights_C  # numpy sums float64 pairwise, but would cast piece by piece if it were to do both
    return float(sums_C.sum())


def _place(weights_C: NDArray[np.float32], uniform: float, work: Workspace) -> int:
    """The place whose share of the running sum `uniform` falls into; never one of weight 0.

    Summed in runs, so that only the run that is hit needs a running sum of its own.
    """
    weights = work.sums_V[: len(weights_C)]
    weights[:] = weights_C
    reached = np.add.reduceat(weights, np.arange(0, len(weights), _RUN)).cumsum()
    run = _hit(reached, uniform * reached[-1])
    start = run * _RUN
    before = reached[run - 1] if run else 0.0
    return start + _hit(weights[start : start + _RUN].cumsum(), uniform * reached[-1] - before)


def _hit(reached: NDArray[np.float64], target: float) -> int:
    """The first place whose running sum exceeds `target`, which rounding may have brought up to the whole."""
    return int(np.searchsorted(reached, min(target, np.nextafter(reached[-1], 0.0)), side="right"))
