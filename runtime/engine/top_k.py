"""The largest of many numbers, without sorting them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GROUP = 64


def largest(x_V: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The ids, ascending, of the `k` largest of `x_V`, and of all that equal the least of these.

    Args:
        x_V: float32 [V], without NaN.
        k: at least 1; of k >= V, all.
    """
    if k >= len(x_V):
        return np.arange(len(x_V))
    # Of V / 64 groups, the maxima: k of them are at least as large as their k-th largest, so it is a lower bound of the
    # k-th largest of all. What passes it is little more than k numbers, and what comes next is cheap.
    groups = len(x_V) // _GROUP
    if k > groups:
        return np.flatnonzero(x_V >= _kth(x_V, k))
    maxima = x_V[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    ids = np.flatnonzero(x_V >= _kth(maxima, k))
    x_C = x_V[ids]
    return ids[x_C >= _kth(x_C, k)]


def _kth(x: NDArray[np.float32], k: int) -> np.float32:
    value: np.float32 = np.partition(x, len(x) - k)[len(x) - k]
    return value
