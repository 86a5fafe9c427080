"""Perplexity of any local engine on text.

The convention is that of `quant.text`, so that the figure is the quantizer's where the engine computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.text import Perplexity, windows
from runtime.engine.base import ModelRunner, SequenceSlice

LOGIT_ROWS = 128
"""Rows of logits that are held at a time: all those of a long context times a large vocabulary are too many."""


class NothingToScoreError(ValueError):
    """No document has two tokens."""


def perplexity(
    runner: ModelRunner,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """The runner's perplexity on `documents`.

    Args:
        runner: used by nobody else meanwhile; its KV blocks are overwritten.
        progress: called after each window with the number of tokens scored so far.

    Raises:
        NothingToScoreError: no document has two tokens.
        NonFiniteError: it is NaN or infinite.
    """
    total, tokens = 0.0, 0
    encoded = (tokenizer.encode(document).ids for document in documents)
    for window in windows(encoded, _window_length(runner)):
        total += _negative_log_likelihood(runner, np.array(window, np.int32))
        tokens += len(window) - 1
        if progress:
            progress(tokens)
    if not tokens:
        raise NothingToScoreError("there is nothing to score: no document has two tokens")
    return Perplexity.from_sum(total, tokens)


def _window_length(runner: ModelRunner) -> int:
    length, capacity = runner.info.context_length, runner.num_blocks * runner.block_size
    if capacity < length:
        raise ValueError(f"a KV cache of {capacity} positions cannot hold the context of {length}")
    return length


def _negative_log_likelihood(runner: ModelRunner, window_L: NDArray[np.int32]) -> float:
    """Summed over all tokens of the window but the first, in nats."""
    block_table = np.arange(runner.num_blocks, dtype=np.int32)
    inputs_L, targets_L = window_L[:-1], window_L[1:]
    total = 0.0
    for start in range(0, len(inputs_L), LOGIT_ROWS):
        ids_N, targets_N = inputs_L[start : start + LOGIT_ROWS], targets_L[start : start + LOGIT_ROWS]
        logits_NV = runner.step([SequenceSlice(ids_N, start, block_table, num_logits=len(ids_N))]).astype(np.float64)
        highest_N = logits_NV.max(axis=-1)
        log_sums_N = highest_N + np.log(np.exp(logits_NV - highest_N[:, None]).sum(axis=-1))
        total += float((log_sums_N - logits_NV[np.arange(len(targets_N)), targets_N]).sum())
    return total
