"""Log-probabilities of tokens: the model's own, before temperature, penalties and what else a sampler does.

Each row is worked on by itself and in one order, so that its figures do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import TokenLogprobs
from runtime.engine.top_k import largest
from runtime.engine.workspace import Workspace


class LogitsError(FloatingPointError):
    """Logits that say nothing: a NaN, a positive infinity, or nothing but negative infinities."""


def highest_logit(logits_V: NDArray[np.float32], position: int) -> np.float32:
    """The maximum of a row; `position` is that of the token it predicts.

    Raises:
        LogitsError: it is not finite.
    """
    highest: np.float32 = logits_V.max()  # of a row that holds a NaN, NaN
    if not np.isfinite(highest):
        raise LogitsError(f"the highest of the logits for position {position} is {highest}")
    return highest


def token_logprobs(
    logits_V: NDArray[np.float32], token_id: int, top: int, position: int, work: Workspace
) -> TokenLogprobs:
    """What a row says of `token_id`, which stands at `position`, and of the `top` likeliest tokens.

    Args:
        logits_V: float32 [V]; exponentials are float32, their sum float64.

    Raises:
        LogitsError: the row says nothing.
    """
    highest = highest_logit(logits_V, position)
    np.subtract(logits_V, highest, out=work.weights_V)
    np.exp(work.weights_V, out=work.weights_V)
    work.sums_V[:] = work.weights_V  # numpy sums float64 pairwise, but would cast piece by piece if it were to do both
    log_total = float(highest) + math.log(work.sums_V.sum())
    logit = logits_V[token_id]
    rank = 1 + int(np.count_nonzero(np.greater(logits_V, logit, out=work.mask_V)))
    return TokenLogprobs(token_id, float(logit) - log_total, rank, _top(logits_V, top, log_total))


def prompt_logprobs(
    logits_NV: NDArray[np.float32], token_ids: Sequence[int], top: int, position: int, work: Workspace
) -> list[TokenLogprobs]:
    """The same for N tokens in a row, of which the first stands at `position`; row i predicts `token_ids[i]`."""
    return [
        token_logprobs(logits_V, token_id, top, position + i, work)
        for i, (logits_V, token_id) in enumerate(zip(logits_NV, token_ids, strict=True))
    ]


def _top(logits_V: NDArray[np.float32], count: int, log_total: float) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    ids = largest(logits_V, count)
    order = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
    return tuple((int(token), float(logits_V[token]) - log_total) for token in order)
