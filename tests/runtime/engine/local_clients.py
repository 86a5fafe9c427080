"""A runner that counts, and clients of a `LocalEngine`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np

from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import EngineInfo, FinishReason, GenerationRequest, SamplingParams
from runtime.engine.local import LocalEngine
from runtime.engine.runner import ModelRunner, SequenceSlice
from runtime.engine.scheduler import SchedulerLimits

VOCABULARY = 50


class CountingRunner:
    """The token after t is t + 1. `before_step` may wait, raise, or return the row of logits to spoil with NaN."""

    block_size, num_blocks = 4, 64
    info = EngineInfo("counting", "float32", 200, VOCABULARY)

    def __init__(self, before_step: Callable[[Sequence[SequenceSlice]], int | None] = lambda batch: None) -> None:
        self.before_step = before_step
        self.steps = 0

    def step(self, batch: Sequence[SequenceSlice]) -> ArrayLogits:
        self.steps += 1
        spoilt = self.before_step(batch)
        last = [slice_.token_ids[-1] for slice_ in batch if slice_.num_logits]
        logits = np.zeros((len(last), VOCABULARY), np.float32)
        logits[np.arange(len(last)), [(token + 1) % VOCABULARY for token in last]] = 100
        if spoilt is not None:
            logits[spoilt] = np.nan
        return ArrayLogits(logits)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """It keeps nothing in them."""


def request(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 5, **sampling: float) -> GenerationRequest:
    settings = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(name, tuple(prompt), settings)


async def collect(engine: LocalEngine, wanted: GenerationRequest) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        reason = chunk.finish_reason
    return tokens, reason


@asynccontextmanager
async def running(runner: ModelRunner, **limits: int) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(runner, SchedulerLimits(**limits))
    try:
        yield engine
    finally:
        await engine.shutdown(0)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def idle(engine: LocalEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
