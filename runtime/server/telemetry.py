"""What Prometheus sees: vLLM's metrics under its names, with the prefix `osp_` for `vllm:`.

As there, a "request" is one sequence: a request with three prompts counts as three.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.engine.base import Engine, EngineStats, FinishReason, RequestRejectedError

LABELS = ("model_name", "engine", "precision")
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""From a millisecond, a token of a small model, to minutes, a long answer of a large one."""


class Telemetry:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(name, help, LABELS, buckets=LATENCY_BUCKETS_S, registry=self._registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, (*LABELS, *labels), registry=self._registry)

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(name, help, LABELS, registry=self._registry)

        self.time_to_first_token = histogram("osp_time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = histogram("osp_inter_token_latency_seconds", "Between tokens of a sequence.")
        self.e2e_latency = histogram("osp_e2e_request_latency_seconds", "From arrival to the last token.")
        self.prompt_tokens = counter("osp_prompt_tokens_total", "Prompt tokens of sequences that got a token.")
        self.generation_tokens = counter("osp_generation_tokens_total", "Tokens generated.")
        self.success = counter("osp_request_success_total", "Ended sequences, by reason.", "finished_reason")
        self.running = gauge("osp_num_requests_running", "Sequences in the running batch.")
        self.waiting = gauge("osp_num_requests_waiting", "Sequences that wait to be run.")
        self.kv_usage = gauge("osp_kv_cache_usage_perc", "Share of KV cache blocks in use; 1 is all.")

    def of_model(self, name: str, engine: Engine) -> ModelTelemetry:
        """The metrics of one served model."""
        return ModelTelemetry(self, name, engine)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format. Reads the engines' stats: call it from their event loop."""
        return generate_latest(self._registry)


class ModelTelemetry:
    """The metrics with one model's labels filled in."""

    def __init__(self, telemetry: Telemetry, name: str, engine: Engine) -> None:
        labels = (name, engine.info.engine, engine.info.precision)
        self.time_to_first_token = telemetry.time_to_first_token.labels(*labels)
        self.inter_token_latency = telemetry.inter_token_latency.labels(*labels)
        self.e2e_latency = telemetry.e2e_latency.labels(*labels)
        self.prompt_tokens = telemetry.prompt_tokens.labels(*labels)
        self.generation_tokens = telemetry.generation_tokens.labels(*labels)
        # All of them exist from the start, so that a rate over a scrape interval misses no first event.
        self.success = {reason: telemetry.success.labels(*labels, reason) for reason in FinishReason}

        def follow(gauge: Gauge, value: Callable[[EngineStats], float]) -> None:
            gauge.labels(*labels).set_function(lambda: value(engine.stats()))

        follow(telemetry.running, lambda stats: stats.running)
        follow(telemetry.waiting, lambda stats: stats.waiting)
        follow(telemetry.kv_usage, lambda stats: stats.kv_usage)


class ArrivalClock:
    """ASGI middleware: puts the time of a request's arrival, before its body is read, into `request.state.arrival`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["arrival"] = perf_counter()
        await self._app(scope, receive, send)


class SequenceTimer:
    """Records one sequence, from its arrival to its end. A context; leaving it early counts as an abort.

    A sequence that the engine would not take is not recorded at all.
    """

    def __init__(self, telemetry: ModelTelemetry, prompt_tokens: int, arrival: float) -> None:
        self._telemetry = telemetry
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._last_token: float | None = None
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        rejected = kind is not None and issubclass(kind, RequestRejectedError)
        if not self._finished and not rejected:
            self.finished(FinishReason.ABORT)

    def tokens(self, count: int) -> None:
        """`count` tokens have come, at the same time."""
        if count == 0:
            return
        now = perf_counter()
        if self._last_token is None:
            self._telemetry.time_to_first_token.observe(now - self._arrival)
            self._telemetry.prompt_tokens.inc(self._prompt_tokens)
        else:
            self._telemetry.inter_token_latency.observe(now - self._last_token)
        self._telemetry.generation_tokens.inc(count)
        self._last_token = now

    def finished(self, reason: FinishReason) -> None:
        """The sequence has ended. Of aborted ones only the number is kept: their times say nothing."""
        self._finished = True
        self._telemetry.success[reason].inc()
        if reason is not FinishReason.ABORT:
            self._telemetry.e2e_latency.observe(perf_counter() - self._arrival)
