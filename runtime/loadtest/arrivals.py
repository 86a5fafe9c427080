"""When requests arrive in an open loop: at a rate, however the server fares."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def arrival_times(count: int, request_rate: float, burstiness: float, seed: int) -> NDArray[np.float64]:
    """Seconds after the start at which `count` requests are due, ascending.

    The times between them are gamma-distributed: `burstiness` is the shape, and 1 makes a Poisson process, less makes
    bursts, more makes them even. All are stretched so that the last one is due at `count / request_rate`, as
    `vllm bench serve` does: the rate is exact, whatever the seed.

    Args:
        request_rate: requests a second, positive; infinite, and all are due at once.
        burstiness: positive; infinite makes all times between them equal.

    Raises:
        ValueError: a rate or burstiness that is not positive.
    """
    if not request_rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate and burstiness must be positive, not {request_rate} and {burstiness}")
    if math.isinf(request_rate):
        return np.zeros(count)
    even, rng = math.isinf(burstiness), np.random.default_rng(seed)
    gaps_N = np.ones(count) if even else rng.gamma(burstiness, size=count)
    times_N = np.cumsum(gaps_N)
    return np.asarray(times_N * (count / request_rate / times_N[-1]) if count else times_N, np.float64)
