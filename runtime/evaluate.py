"""Perplexity of any local engine on text.

The convention, which `quant.perplexity` shares: every document is encoded by the tokenizer as it stands and cut into
consecutive windows of the context length; a last window of one token is dropped; the first token of a window is not
scored. Perplexity is exp(sum of negative log likelihoods / number of scored tokens), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.arithmetic import NonFiniteError
from runtime.engine.base import ModelRunner, SequenceSlice

LOGIT_ROWS = 128
"""Rows of logits that are held at a time: all those of a long context times a large vocabulary are too many."""


class NothingToScoreError(ValueError):
    """No document has two tokens."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`perplexity` over `tokens` scored tokens."""

    perplexity: float
    tokens: int


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
        NonFiniteError: the model computes NaN or infinity.
    """
    total, tokens = 0.0, 0
    for document in documents:
        token_ids = np.array(tokenizer.encode(document).ids, np.int32)
        for window_L in _windows(token_ids, _window_length(runner)):
            total += _negative_log_likelihood(runner, window_L)
            tokens += len(window_L) - 1
            if progress:
                progress(tokens)
    if not tokens:
        raise NothingToScoreError("there is nothing to score: no document has two tokens")
    if not math.isfinite(total):
        raise NonFiniteError(f"the perplexity over {tokens} tokens is not finite: the model computes NaN or infinity")
    return Perplexity(math.exp(min(total / tokens, math.log(1e300))), tokens)


def _window_length(runner: ModelRunner) -> int:
    length, capacity = runner.info.context_length, runner.num_blocks * runner.block_size
    if capacity < length:
        raise ValueError(f"a KV cache of {capacity} positions cannot hold the context of {length}")
    return length


def _windows(token_ids: NDArray[np.int32], length: int) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(token_ids), length):
        window_L = token_ids[start : start + length]
        if len(window_L) >= 2:
            yield window_L


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
