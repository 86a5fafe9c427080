"""What Prometheus sees of a server and its models.

As in vLLM, a "request" is one sequence: a request with three prompts counts as three. An HTTP request is called one.
"""

from __future__ import annotations

from time import perf_counter
from typing import Self

from prometheus_client import generate_latest

from runtime.engine.base import Engine, EngineDeadError, FinishReason, GenerationError, RequestRejectedError
from runtime.server.request_record import RequestRecord, request_record
from runtime.server.telemetry_metrics import ERROR, Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Telemetry:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.metrics = Metrics()

    def of_model(self, name: str, engine: Engine) -> ModelTelemetry:
        """The metrics of one served model."""
        return ModelTelemetry(self.metrics, name, engine)

    def answered(self, record: RequestRecord) -> None:
        """Counts an HTTP request that is over."""
        status = record.status or 0
        # Of paths that are no routes, and of words in a method's place, there are any number.
        method = record.method if record.method in METHODS else "other"
        self.metrics.http_requests.labels(record.route or "none", method, str(status)).inc()
        if status >= 400 and record.error is not None:
            self.metrics.rejected.labels(record.error).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format. Reads the engines' stats: call it from their event loop."""
        return generate_latest(self.metrics.registry)


class ModelTelemetry:
    """The metrics with one model's labels filled in."""

    def __init__(self, metrics: Metrics, name: str, engine: Engine) -> None:
        info = engine.info
        labels = (name, info.engine, info.precision)
        self.model_name = name
        self.time_to_first_token = metrics.time_to_first_token.labels(*labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(*labels)
        self.time_per_output_token = metrics.time_per_output_token.labels(*labels)
        self.e2e_latency = metrics.e2e_latency.labels(*labels)
        self.queue_time = metrics.queue_time.labels(*labels)
        self.prefill_time = metrics.prefill_time.labels(*labels)
        self.decode_time = metrics.decode_time.labels(*labels)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(*labels)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(*labels)
        self.request_max_tokens = metrics.request_max_tokens.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.prompt_tokens_cached = metrics.prompt_tokens_cached.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.corrupted = metrics.corrupted.labels(*labels)
        # All of them exist from the start, so that a rate over a scrape interval misses no first event.
        self.success = {reason: metrics.success.labels(*labels, reason) for reason in (*FinishReason, ERROR)}

        metrics.engines.follow(name, engine)
        step_time, step_tokens = metrics.step_time.labels(*labels), metrics.step_tokens.labels(*labels)

        def observe_step(seconds: float, tokens: int) -> None:
            step_time.observe(seconds)
            step_tokens.observe(tokens)

        engine.observe_steps(observe_step)


class SequenceTimer:
    """Records one sequence, from its arrival to its end. A context; leaving it early counts as an abort or an error.

    A sequence that the engine would not take is not recorded at all.
    """

    def __init__(self, telemetry: ModelTelemetry, prompt_tokens: int, arrival: float) -> None:
        """Takes the tokens of the prompt, or 0 if another sequence of the same prompt counts them."""
        self._telemetry = telemetry
        self._record = request_record()
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._tokens = 0
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._finished or (kind is not None and issubclass(kind, RequestRejectedError)):
            return
        failed = kind is not None and issubclass(kind, (GenerationError, EngineDeadError))
        self._ended(ERROR if failed else FinishReason.ABORT)

    def tokens(self, count: int) -> None:
        """`count` tokens have come, at the same time."""
        if count == 0:
            return
        now = perf_counter()
        if self._last_token is None:
            self._first_token = now
            self._telemetry.time_to_first_token.observe(now - self._arrival)
            self._count_prompt()
        else:
            self._telemetry.inter_token_latency.observe(now - self._last_token)
        self._telemetry.generation_tokens.inc(count)
        self._record.count_completion(count)
        self._tokens += count
        self._last_token = now

    def finished(self, reason: FinishReason) -> None:
        """The sequence has ended. Of aborted ones only the number is kept: their times say nothing."""
        self._ended(reason)
        if reason is FinishReason.ABORT:
            return
        if self._first_token is None:  # a prompt that was only scored
            self._count_prompt()
        self._telemetry.e2e_latency.observe(perf_counter() - self._arrival)
        self._telemetry.request_generation_tokens.observe(self._tokens)
        if self._first_token is None or self._last_token is None:
            return
        decode_time = self._last_token - self._first_token
        self._telemetry.decode_time.observe(decode_time)
        if self._tokens > 1:
            self._telemetry.time_per_output_token.observe(decode_time / (self._tokens - 1))

    def _count_prompt(self) -> None:
        self._telemetry.prompt_tokens.inc(self._prompt_tokens)
        self._record.count_prompt(self._prompt_tokens)

    def _ended(self, reason: str) -> None:
        self._finished = True
        self._telemetry.success[reason].inc()
        self._record.finish_reasons.append(str(reason))
