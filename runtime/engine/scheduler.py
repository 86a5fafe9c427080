"""Decides what each step computes: continuous batching, first come first served, with chunked prefill.

No threads, no clock, no numbers but token ids: `add` and `abort` whenever, and in turn `schedule`, compute, `advance`.

- A request is admitted when blocks for its prompt and all of its `max_tokens` are free. So a running request never
  has to be put off, and the queue's head is never overtaken: whoever waits will run.
- A step first gives every decoding sequence its one token, then fills the token budget with prefill, oldest first. So
  long prompts delay the others' tokens by one bounded step, and cannot stop them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    SequenceSlice,
    TokenChunk,
)
from runtime.engine.kv_cache import BlockAllocator


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much work is taken on at once.

    Attributes:
        token_budget: most tokens that a step computes, prefill and decode together; >= `max_sequences`, so that
            a step has room for every running sequence.
        max_sequences: most sequences that run at the same time.
        max_waiting: most requests that wait; beyond them `QueueFullError`.
    """

    token_budget: int = 512
    max_sequences: int = 32
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if self.max_sequences < 1 or self.max_waiting < 1:
            raise ValueError(f"max_sequences and max_waiting must be at least 1: {self}")
        if self.token_budget < self.max_sequences:
            raise ValueError(f"token_budget must be at least max_sequences: {self}")


@dataclass(slots=True, eq=False)
class RunningSequence:
    """An admitted request. The keys and values of its first `computed` tokens are in the cache."""

    request: GenerationRequest
    tokens: list[int]
    block_table: NDArray[np.int32]
    computed: int = 0
    finished: bool = False

    @property
    def decoding(self) -> bool:
        """Whether all but its newest token are in the cache, that newest one having been sampled."""
        return self.computed >= len(self.request.prompt_token_ids)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def slice(self, length: int) -> SequenceSlice:
        """The next `length` tokens, with logits where they end the sequence."""
        end = self.computed + length
        return SequenceSlice(
            token_ids=np.array(self.tokens[self.computed : end], np.int32),
            start=self.computed,
            block_table=self.block_table,
            num_logits=int(end == len(self.tokens)),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One step's work: `slices[i]` belongs to `sequences[i]`."""

    sequences: list[RunningSequence] = field(default_factory=list)
    slices: list[SequenceSlice] = field(default_factory=list)

    def sampled(self) -> list[RunningSequence]:
        """The sequences that get a new token, in the order of the rows of logits."""
        pairs = zip(self.sequences, self.slices, strict=True)
        return [sequence for sequence, slice_ in pairs if slice_.num_logits]


class Scheduler:
    """The queue of waiting requests, the running sequences and their KV blocks. One caller at a time."""

    def __init__(self, allocator: BlockAllocator, limits: SchedulerLimits) -> None:
        self._allocator = allocator
        self._limits = limits
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[RunningSequence] = []  # in the order of arrival

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self._waiting or self._running)

    def stats(self) -> EngineStats:
        """How many requests run and wait, and how full the cache is."""
        return EngineStats(len(self._running), len(self._waiting), self._allocator.usage)

    def add(self, request: GenerationRequest) -> None:
        """Queues a request that `check_request` has passed and whose id is not live.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            RequestRejectedError: it needs more blocks than the cache has.
        """
        if self._blocks_for(request) > self._allocator.num_blocks:
            capacity = self._allocator.num_blocks * self._allocator.block_size
            raise RequestRejectedError(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens of {request.sampling.max_tokens} exceed "
                f"the KV cache of {capacity} positions"
            )
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already; try again later")
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Drops a request and frees its blocks; also between `schedule` and `advance`. False: no such request."""
        for sequence in self._running:
            if sequence.request.request_id == request_id:
                self._finish(sequence)
                return True
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return True
        return False

    def schedule(self) -> Step:
        """The next step's work; empty only when idle."""
        self._admit()
        step, budget = Step(), self._limits.token_budget
        # A stable sort: decoding sequences first, each group in the order of arrival.
        for sequence in sorted(self._running, key=lambda sequence: not sequence.decoding):
            length = min(len(sequence.tokens) - sequence.computed, budget)
            if length == 0:
                break
            step.sequences.append(sequence)
            step.slices.append(sequence.slice(length))
            budget -= length
        return step

    def advance(self, step: Step, tokens: Mapping[RunningSequence, int]) -> dict[str, TokenChunk]:
        """Takes in that a step has been computed, and the tokens sampled from it.

        Args:
            tokens: one for each of `step.sampled()`; those of sequences that were aborted since are ignored.

        Returns:
            By request id, what each request that got a token has to hear.
        """
        chunks = {}
        for sequence, slice_ in zip(step.sequences, step.slices, strict=True):
            if sequence.finished:
                continue
            sequence.computed += len(slice_.token_ids)
            if slice_.num_logits:
                chunks[sequence.request.request_id] = self._append(sequence, tokens[sequence])
        return chunks

    def _append(self, sequence: RunningSequence, token: int) -> TokenChunk:
        sequence.tokens.append(token)
        sampling = sequence.request.sampling
        reason = None
        if token in sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.generated >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason:
            self._finish(sequence)
        return TokenChunk((token,), reason)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._limits.max_sequences:
            request = self._waiting[0]
            count = self._blocks_for(request)
            if count > self._allocator.num_free:
                break
            self._waiting.popleft()
            table = np.array(self._allocator.allocate(count), np.int32)
            self._running.append(RunningSequence(request, list(request.prompt_token_ids), table))

    def _finish(self, sequence: RunningSequence) -> None:
        sequence.finished = True
        self._running.remove(sequence)
        self._allocator.free(sequence.block_table.tolist())

    def _blocks_for(self, request: GenerationRequest) -> int:
        # The last token generated is never an input, so its keys and values are never computed.
        return self._allocator.blocks_for(len(request.prompt_token_ids) + request.sampling.max_tokens - 1)
