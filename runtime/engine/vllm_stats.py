"""What vLLM's scheduler tells of each step, as `Engine.stats` and `Engine.observe_steps` tell it.

vLLM calls the interface unstable that this reads: `StatLoggerBase`, `SchedulerStats` and `IterationStats` of
`vllm.v1.metrics`. Nothing else of the adapter knows of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from runtime.engine.base import EngineStats


class StepRecord:
    """Sums up what a server's schedulers have done; with data parallelism there are several of them.

    Attributes:
        progressed: when a step last ended, by `time.monotonic`.
        observe: told of each step: its seconds, and how many tokens it computed.
    """

    def __init__(self) -> None:
        self.progressed = time.monotonic()
        self.observe: Callable[[float, int], None] = lambda *_: None
        self._running: dict[int, int] = {}
        self._kv_usage: dict[int, float] = {}
        self._preemptions = self._queries = self._hits = 0

    def logger(self, config: Any, engine_index: int = 0) -> _StatLogger:  # noqa: ARG002 - vLLM's signature
        """A factory of stat loggers, as `AsyncLLM` wants one."""
        return _StatLogger(self, engine_index)

    def take(self, scheduler: Any | None, iteration: Any | None, engine_index: int) -> None:
        """Takes note of a step's `SchedulerStats` and `IterationStats`; either may be missing."""
        self.progressed = time.monotonic()
        if iteration is not None:
            self._preemptions += iteration.num_preempted_reqs
        if scheduler is None:
            return
        self._running[engine_index] = scheduler.num_running_reqs
        self._kv_usage[engine_index] = scheduler.kv_cache_usage
        # Hits and queries since the last report.
        self._queries += scheduler.prefix_cache_stats.queries
        self._hits += scheduler.prefix_cache_stats.hits
        details = scheduler.iteration_details
        if details is not None and not details.is_dummy:
            self.observe(details.elapsed_ms / 1000, details.num_ctx_tokens + details.num_generation_tokens)

    def snapshot(self, live: int) -> EngineStats:
        """The state now, of an engine that has `live` sequences, running or waiting.

        vLLM reports after a step; of an abort that leaves nothing to compute it says nothing any more.
        """
        running = min(live, sum(self._running.values()))
        usage = sum(self._kv_usage.values()) / len(self._kv_usage) if self._kv_usage and live else 0.0
        return EngineStats(running, live - running, usage, self._preemptions, self._queries, self._hits)


class _StatLogger:
    """`StatLoggerBase`, by its methods only: that class is there where vLLM is installed."""

    def __init__(self, steps: StepRecord, engine_index: int) -> None:
        self._steps = steps
        self._engine_index = engine_index

    def record(
        self,
        scheduler_stats: Any | None,
        iteration_stats: Any | None,
        mm_cache_stats: Any | None = None,  # noqa: ARG002 - vLLM's signature
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """After each step, in the event loop."""
        self._steps.take(scheduler_stats, iteration_stats, self._engine_index)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say: `/metrics` is where these figures go."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """The adapter never puts vLLM to sleep."""
