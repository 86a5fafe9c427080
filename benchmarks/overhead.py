"""What a token costs besides the model: scheduling, sampling, Python and the way to a client in the event loop.

    python -m benchmarks.overhead --model demo --tokens 400 --rounds 5

One greedy request at a time runs through `LocalEngine`, on a runner that notes how long its steps take; the rest of the
time is overhead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median

import click

from runtime.engine.base import EngineInfo, GenerationRequest, SamplingParams
from runtime.engine.local import LocalEngine
from runtime.engine.registry import load_runner
from runtime.engine.runner import ModelRunner, SequenceSlice, StepLogits
from runtime.model_store import resolve_model

PROMPT = tuple(range(100, 116))


class TimedRunner:
    """A `ModelRunner` that adds up the seconds of its steps."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.seconds = 0.0

    @property
    def info(self) -> EngineInfo:
        """See `ModelRunner.info`."""
        return self._runner.info

    @property
    def block_size(self) -> int:
        """See `ModelRunner.block_size`."""
        return self._runner.block_size

    @property
    def num_blocks(self) -> int:
        """See `ModelRunner.num_blocks`."""
        return self._runner.num_blocks

    def step(self, batch: Sequence[SequenceSlice]) -> StepLogits:
        """See `ModelRunner.step`."""
        began = time.perf_counter()
        logits = self._runner.step(batch)
        self.seconds += time.perf_counter() - began
        return logits

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`."""
        self._runner.copy_blocks(sources, targets)


async def measure(engine: LocalEngine, runner: TimedRunner, tokens: int, name: str) -> tuple[float, float]:
    """Microseconds a token: all of it, and the steps'."""
    runner.seconds, began = 0.0, time.perf_counter()
    async for _ in engine.generate(GenerationRequest(name, PROMPT, SamplingParams(max_tokens=tokens, temperature=0))):
        pass
    return (time.perf_counter() - began) / tokens * 1e6, runner.seconds / tokens * 1e6


async def run(model: str, engine_name: str, tokens: int, rounds: int) -> None:
    """Measures, and prints the medians."""
    runner = TimedRunner(load_runner(engine_name, resolve_model(model)))
    engine = LocalEngine(runner)
    await measure(engine, runner, 16, "warm-up")
    results = [await measure(engine, runner, tokens, str(number)) for number in range(rounds)]
    await engine.shutdown(0)
    steps = median(step for _, step in results)
    overhead = median(whole - step for whole, step in results)
    click.echo(f"{model}: {steps:.0f} us a token in the runner's step, {overhead:.0f} us besides")


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--engine", default="native", show_default=True)
@click.option("--tokens", default=400, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(model: str, engine: str, tokens: int, rounds: int) -> None:
    """Microseconds a token of batch 1, in the model and besides."""
    asyncio.run(run(model, engine, tokens, rounds))


if __name__ == "__main__":
    main()
