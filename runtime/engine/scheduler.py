"""Decides what each step computes: continuous batching with chunked prefill, over a KV cache that may be too small.

No threads, no clock, no numbers but token ids: `add` and `abort` whenever, and in turn `schedule`, compute, `advance`.

- Sequences have a rank: priority, then arrival, then index in the request. Within a priority, nobody is overtaken.
- The head of the queue is admitted when blocks for its prompt are free and one more, so that the running sequences
  need not give up blocks at once. What the prefix cache has of the prompt is not computed again.
- A step first gives every decoding sequence its one token, then fills the token budget with prefill, by rank. So
  long prompts delay the others' tokens by one bounded step, and cannot stop them.
- When a sequence needs a block and none is free, the running sequence of the last rank is put off: it gives up its
  blocks, goes back to the queue, and later computes prompt and generated tokens anew. The first in rank is never put
  off, gets on in every step and can have the whole cache. So it ends, and so does the next: everybody who waits will
  run, unless requests of a better priority never cease to come.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from runtime.engine.base import (
    EngineStats,
    GenerationError,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    TokenChunk,
)
from runtime.engine.kv_cache import BlockPool
from runtime.engine.sequence import ScheduledSequence, most_positions
from runtime.engine.step import Outcome, Step

_RANK = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much work is taken on at once.

    Attributes:
        token_budget: most tokens that a step computes, prefill and decode together; >= `max_sequences`, so that
            a step has room for every running sequence.
        max_sequences: most sequences that run at the same time; a request's `n` may not exceed it.
        max_waiting: most sequences that wait; beyond them `QueueFullError`.
        logit_rows: most rows of logits that a step yields, >= `max_sequences`; bounds the memory of prompt logprobs.
        prefix_caching: whether the KV blocks of common prefixes are used again.
        step_timeout_s: a step that takes longer has hung, says `LocalEngine.check_health`.
    """

    token_budget: int = 512
    max_sequences: int = 32
    max_waiting: int = 256
    logit_rows: int = 128
    prefix_caching: bool = True
    step_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_sequences < 1 or self.max_waiting < 1:
            raise ValueError(f"max_sequences and max_waiting must be at least 1: {self}")
        if self.token_budget < self.max_sequences or self.logit_rows < self.max_sequences:
            raise ValueError(f"token_budget and logit_rows must be at least max_sequences: {self}")
        if not self.step_timeout_s > 0:
            raise ValueError(f"step_timeout_s must be more than 0: {self}")


class Scheduler:
    """The queue of waiting sequences, the running ones and their KV blocks. One caller at a time."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._limits = limits
        # Both by rank. A sequence that was put off is thereby ahead of all that came after it.
        self._waiting: list[ScheduledSequence] = []
        self._running: list[ScheduledSequence] = []
        self._unfinished: dict[str, list[ScheduledSequence]] = {}  # by request id
        self._arrivals = self._preemptions = self._queried_tokens = self._cached_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self._waiting or self._running)

    def stats(self) -> EngineStats:
        """How much is going on, and how full the cache is."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_usage=self._pool.usage,
            preemptions=self._preemptions,
            prefix_cache_queries=self._queried_tokens,
            prefix_cache_hits=self._cached_tokens,
        )

    def add(self, request: GenerationRequest) -> None:
        """Queues a request that `check_request` has passed and whose id is not live.

        Raises:
            QueueFullError: `max_waiting` sequences wait already.
            RequestRejectedError: one of its sequences needs more blocks than the cache has, or it has too many.
        """
        if request.n > self._limits.max_sequences:
            raise RequestRejectedError(f"n is {request.n}; this engine runs {self._limits.max_sequences} at a time")
        if self._pool.blocks_for(most_positions(request)) > self._pool.num_blocks:
            capacity = self._pool.num_blocks * self._pool.block_size
            raise RequestRejectedError(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens of {request.sampling.max_tokens} exceed "
                f"the KV cache of {capacity} positions"
            )
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already; try again later")
        sequence = ScheduledSequence(request, self._arrivals, self._pool)
        self._arrivals += 1
        insort(self._waiting, sequence, key=_RANK)
        self._unfinished[request.request_id] = [sequence]

    def abort(self, request_id: str, index: int | None = None) -> list[int]:
        """Drops a request, or its sequence `index`, and frees its blocks; also between `schedule` and `advance`.

        Returns:
            The indices of the sequences that have ended by it; none: there is no such request, or not any more.
        """
        ended: list[int] = []
        for sequence in list(self._unfinished.get(request_id, ())):
            dropped = [i for i in sequence.samplers if index is None or i == index]
            if len(dropped) == len(sequence.samplers):
                self._finish(sequence)
            else:
                # A new dictionary: the step that is under way goes through the old one.
                sequence.samplers = {i: s for i, s in sequence.samplers.items() if i not in dropped}
            ended += dropped
        return ended

    def schedule(self) -> Step:
        """The next step's work; empty only when idle."""
        step = Step()
        for sequence in self._running:  # those that are put off meanwhile leave at its end
            if sequence.decoding and self._secure_block(sequence, step):
                step.add(sequence, 1)
        self._admit()
        self._prefill(step)
        return step

    def advance(self, step: Step, outcomes: Sequence[Outcome]) -> list[tuple[str, TokenChunk | GenerationError]]:
        """Takes in that a step has been computed, and what came of it.

        Args:
            outcomes: one for each of `step.sequences`; those of sequences that were aborted since are ignored.

        Returns:
            Request ids, and what they have to hear.
        """
        news: list[tuple[str, TokenChunk | GenerationError]] = []
        for sequence, slice_, outcome in zip(step.sequences, step.slices, outcomes, strict=True):
            if sequence.finished:
                continue
            request_id = sequence.request.request_id
            if outcome.error is not None:
                self.abort(request_id)
                news.append((request_id, outcome.error))
                continue
            sequence.computed += len(slice_.token_ids)
            sequence.prompt_logprobs += outcome.prompt_logprobs
            if self._limits.prefix_caching:
                sequence.table.file(sequence.keys, sequence.computed)
            if sequence.remaining == 0:
                news += [(request_id, chunk) for chunk in self._chunks(sequence, outcome)]
        return news

    def _chunks(self, sequence: ScheduledSequence, outcome: Outcome) -> list[TokenChunk]:
        if sequence.request.sampling.max_tokens == 0:
            self._finish(sequence)
            return [sequence.scored()]
        chunks = []
        for child in self._forked(sequence):
            chunk = child.append(outcome.samples[child.index])
            if chunk.finish_reason is not None:
                self._finish(child)
            chunks.append(chunk)
        return chunks

    def _forked(self, sequence: ScheduledSequence) -> list[ScheduledSequence]:
        """The sequences that a sequence stands for; they run from now on."""
        if len(sequence.samplers) == 1:
            return [sequence]
        family = sequence.fork()
        for child in family[1:]:
            insort(self._running, child, key=_RANK)
            self._unfinished[child.request.request_id].append(child)
        return family

    def _secure_block(self, sequence: ScheduledSequence, step: Step) -> bool:
        """Gives a running sequence a block of its own for its next token. False: it had to be put off itself."""
        table, position = sequence.table, sequence.computed
        while (shared := table.shared(position)) or table.missing(position + 1):
            if self._pool.num_free:
                if shared:
                    step.copies.append(table.replace(position))
                else:
                    table.extend(position + 1)
                break
            last = self._running[-1]
            self._put_off(last)
            if last is sequence:
                return False
        return True

    def _put_off(self, sequence: ScheduledSequence) -> None:
        self._running.remove(sequence)
        sequence.table.release()
        sequence.computed = 0
        sequence.prompt_logprobs.clear()
        insort(self._waiting, sequence, key=_RANK)
        self._preemptions += 1

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            # A request that will fork needs room for all of its sequences.
            places = sum(len(running.samplers) for running in self._running) + len(sequence.samplers)
            if places > self._limits.max_sequences:
                break
            # Log-probabilities of prompt tokens need their logits, which the cache does not have.
            searched = self._limits.prefix_caching and not sequence.scores_prompt
            known = sequence.table.find_prefix(sequence.keys, len(sequence.tokens)) if searched else []
            missing = self._pool.blocks_for(len(sequence.tokens)) - len(known)
            reserve = 1 if self._running else 0
            if missing + reserve > self._pool.num_free - sum(not self._pool.owners(block) for block in known):
                break
            self._start(self._waiting.pop(0), known, searched)

    def _start(self, sequence: ScheduledSequence, known: list[int], searched: bool) -> None:
        sequence.computed = sequence.table.adopt(known)
        sequence.table.extend(len(sequence.tokens))
        insort(self._running, sequence, key=_RANK)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self._queried_tokens += len(sequence.tokens) if searched else 0
            self._cached_tokens += sequence.computed

    def _prefill(self, step: Step) -> None:
        budget = self._limits.token_budget - len(step.sequences)
        # Each running sequence may have one row of logits. What is left goes to prompts that are scored.
        rows = self._limits.logit_rows - len(self._running)
        decoding = set(step.sequences)
        for sequence in self._running:
            if sequence in decoding:
                continue
            length = min(sequence.remaining, budget)
            if sequence.scores_prompt:
                length = min(length, 1 + rows)
                rows -= max(0, length - 1)
            if length == 0:
                break
            step.add(sequence, length)
            budget -= length

    def _finish(self, sequence: ScheduledSequence) -> None:
        sequence.finished = True
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        sequence.table.release()
        live = self._unfinished[sequence.request.request_id]
        live.remove(sequence)
        if not live:
            del self._unfinished[sequence.request.request_id]
