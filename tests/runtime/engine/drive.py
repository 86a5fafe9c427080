"""Runs requests through a `Scheduler` without threads: one step after the other, until all have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from runtime.engine.base import FinishReason, GenerationError, GenerationRequest, TokenChunk
from runtime.engine.kv_cache import BlockPool
from runtime.engine.runner import ModelRunner
from runtime.engine.scheduler import Scheduler, SchedulerLimits
from runtime.engine.step import OutcomeReader, Step


@dataclass
class Heard:
    """What one sequence of a request has heard."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)
    error: GenerationError | None = None

    @property
    def reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason if self.chunks else None


class Drive:
    """A scheduler, a runner and what the requests have heard, by request id and index."""

    def __init__(self, runner: ModelRunner, **limits: float) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(self.pool, SchedulerLimits(**limits))  # type: ignore[arg-type]
        self.heard: dict[tuple[str, int], Heard] = defaultdict(Heard)
        self.ended: list[tuple[str, int]] = []  # in the order in which they ended
        self._reader = OutcomeReader(runner.info.vocab_size)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> Step:
        """One step; `meanwhile` is called while the runner computes."""
        step = self.scheduler.schedule()
        if step.copies:
            self.runner.copy_blocks(*zip(*step.copies, strict=True))
        outcomes = self._reader.read(step, self.runner.step(step.slices))
        meanwhile()
        for request_id, news in self.scheduler.advance(step, outcomes):
            if isinstance(news, GenerationError):
                self.heard[request_id, 0].error = news
                continue
            heard = self.heard[request_id, news.index]
            assert heard.reason is None, "nothing comes after the end"
            heard.tokens += news.token_ids
            heard.chunks.append(news)
            if news.finish_reason is not None:
                self.ended.append((request_id, news.index))
        return step

    def finish(self, most_steps: int = 100_000) -> None:
        for _ in range(most_steps):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError(f"not done after {most_steps} steps")


def run(
    requests: Iterable[GenerationRequest], runner: ModelRunner, **limits: float
) -> dict[tuple[str, int], list[int]]:
    """The tokens of all sequences of requests that arrive together."""
    drive = Drive(runner, **limits)
    for request in requests:
        drive.scheduler.add(request)
    drive.finish()
    assert drive.pool.num_free == runner.num_blocks
    return {name: heard.tokens for name, heard in drive.heard.items()}
