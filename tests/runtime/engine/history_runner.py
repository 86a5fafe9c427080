"""A runner whose logits are a function of all tokens before them, as its KV blocks tell them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import EngineInfo
from runtime.engine.runner import SequenceSlice

VOCABULARY = 32
_MASK = 2**64 - 1
_SALT_V = np.arange(1, VOCABULARY + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def extended(history: int, token: int) -> int:
    """The fingerprint of a history with one more token."""
    return ((history ^ (token + 1)) * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK


def logits_of(history: int) -> NDArray[np.float32]:
    """float32 [V] between 0 and 8."""
    bits_V = (np.uint64(history) ^ _SALT_V) * np.uint64(0xBF58476D1CE4E5B9)
    return ((bits_V >> np.uint64(40)).astype(np.float32) / np.float32(2**21)).astype(np.float32)


def greedy_continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a model with these logits says, without any engine."""
    history, tokens = 0, []
    for token in prompt:
        history = extended(history, token)
    for _ in range(count):
        tokens.append(int(logits_of(history).argmax()))
        history = extended(history, tokens[-1])
    return tokens


class HistoryRunner:
    """Implements `ModelRunner`. Each position of its cache holds the fingerprint of all tokens up to there.

    A token's fingerprint is made of that of the position before it, which is read from the cache: a block that is
    missing, somebody else's or overwritten changes every logit after it.

    Attributes:
        batches: what each step was asked for: (start, length, num_logits) of its slices.
        copied: KV blocks that were copied.
    """

    info = EngineInfo("history", "float32", 400, VOCABULARY)

    def __init__(self, num_blocks: int, block_size: int = 4) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.batches: list[list[tuple[int, int, int]]] = []
        self.copied = 0
        self._cache = [[-1] * block_size for _ in range(num_blocks)]

    def step(self, batch: Sequence[SequenceSlice]) -> ArrayLogits:
        self.batches.append([(each.start, len(each.token_ids), each.num_logits) for each in batch])
        rows = [logits_of(history) for each in batch for history in self._run(each)]
        return ArrayLogits(np.array(rows, np.float32).reshape(-1, VOCABULARY))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self._cache[target] = list(self._cache[source])
            self.copied += 1

    def _run(self, each: SequenceSlice) -> list[int]:
        history, histories = self._read(each, each.start - 1) if each.start else 0, []
        for position, token in enumerate(each.token_ids.tolist(), each.start):
            history = extended(history, token)
            histories.append(history)
            self._cache[each.block_table[position // self.block_size]][position % self.block_size] = history
        return histories[len(histories) - each.num_logits :]

    def _read(self, each: SequenceSlice, position: int) -> int:
        return self._cache[each.block_table[position // self.block_size]][position % self.block_size]
