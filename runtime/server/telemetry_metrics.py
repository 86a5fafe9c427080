"""The metrics of a server: vLLM's under its names, with the prefix `osp_` for `vllm:`, and some that it has not.

`docs/metrics.md` lists them beside vLLM's; a test holds page and registry equal.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine.base import Engine, EngineStats

LABELS = ("model_name", "engine", "precision")

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""From a millisecond, a token of a small model, to minutes, a long answer of a large one."""

TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

ERROR = "error"
"""The `finished_reason` of a sequence that failed; the others are `FinishReason`'s."""


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        # A time series for each counter that says when it was created: nobody looks at them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def histogram(name: str, help: str, buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> Histogram:
            return Histogram(name, help, LABELS, buckets=buckets, registry=self.registry)

        def counter(name: str, help: str, labels: tuple[str, ...] = LABELS) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        self.time_to_first_token = histogram("osp_time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = histogram(
            "osp_inter_token_latency_seconds", "Between deliveries of tokens of a sequence."
        )
        self.time_per_output_token = histogram(
            "osp_request_time_per_output_token_seconds", "Mean of a sequence's times between tokens."
        )
        self.e2e_latency = histogram("osp_e2e_request_latency_seconds", "From arrival to the last token.")
        self.queue_time = histogram("osp_request_queue_time_seconds", "From submission to the first step.")
        self.prefill_time = histogram("osp_request_prefill_time_seconds", "From the first step to the first token.")
        self.decode_time = histogram("osp_request_decode_time_seconds", "From the first token to the last.")
        self.step_time = histogram("osp_engine_step_seconds", "Computing and sampling one step of the engine.")
        self.step_tokens = histogram("osp_engine_step_tokens", "Tokens computed in one step.", TOKEN_BUCKETS)
        self.request_prompt_tokens = histogram(
            "osp_request_prompt_tokens", "Tokens of a prompt that was computed.", TOKEN_BUCKETS
        )
        self.request_generation_tokens = histogram(
            "osp_request_generation_tokens", "Tokens of a sequence that has ended.", TOKEN_BUCKETS
        )
        self.request_max_tokens = histogram(
            "osp_request_params_max_tokens", "What requests that were computed set as max_tokens.", TOKEN_BUCKETS
        )

        self.prompt_tokens = counter("osp_prompt_tokens_total", "Prompt tokens, those from the prefix cache too.")
        self.prompt_tokens_cached = counter("osp_prompt_tokens_cached_total", "Prompt tokens from the prefix cache.")
        self.generation_tokens = counter("osp_generation_tokens_total", "Tokens generated.")
        self.success = counter("osp_request_success_total", "Ended sequences, by reason.", (*LABELS, "finished_reason"))
        self.corrupted = counter("osp_corrupted_requests_total", "Requests that failed of NaN or infinite logits.")

        self.rejected = counter(
            "osp_requests_rejected_total", "HTTP requests that were refused, by reason.", ("reason",)
        )
        self.http_requests = counter(
            "osp_http_requests_total", "HTTP requests, by route, method and status.", ("handler", "method", "status")
        )
        self.loop_lag = Histogram(
            "osp_event_loop_lag_seconds",
            "How much later than due the server's event loop runs what is due, sampled.",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )

        build_info = Gauge(
            "osp_build_info", "1, for this server.", ("version", "python_version"), registry=self.registry
        )
        build_info.labels(version("osp-runtime"), platform.python_version()).set(1)
        self.engines = EngineCollector()
        self.registry.register(self.engines)
        ProcessCollector(registry=self.registry)


class EngineCollector(Collector):
    """Asks the engines for their `EngineInfo` and `EngineStats` whenever the metrics are read."""

    def __init__(self) -> None:
        self._engines: list[tuple[str, Engine]] = []

    def follow(self, model_name: str, engine: Engine) -> None:
        """Adds an engine."""
        self._engines.append((model_name, engine))

    def collect(self) -> Iterator[Metric]:
        """What each engine is, and one family for each field of `EngineStats`."""
        yield self._info()
        snapshots = [((name, e.info.engine, e.info.precision), e.stats()) for name, e in self._engines]
        for field in fields(EngineStats):
            family = _STATS[field.name](labels=LABELS)
            for labels, snapshot in snapshots:
                family.add_metric(labels, getattr(snapshot, field.name))
            yield family

    def _info(self) -> Metric:
        named = ("engine", "precision", "context_length", "vocab_size", "kernel")
        family = GaugeMetricFamily("osp_engine_info", "1, for each model.", labels=("model_name", *named))
        for name, engine in self._engines:
            family.add_metric((name, *(str(getattr(engine.info, label)) for label in named)), 1)
        return family


def _gauge(name: str, help: str) -> Callable[..., GaugeMetricFamily]:
    return lambda labels: GaugeMetricFamily(name, help, labels=labels)


def _counter(name: str, help: str) -> Callable[..., CounterMetricFamily]:
    return lambda labels: CounterMetricFamily(name, help, labels=labels)


_STATS: dict[str, Callable[..., GaugeMetricFamily | CounterMetricFamily]] = {
    "running": _gauge("osp_num_requests_running", "Sequences in the running batch."),
    "waiting": _gauge("osp_num_requests_waiting", "Sequences that wait to be run."),
    "kv_usage": _gauge("osp_kv_cache_usage_perc", "Share of KV cache blocks in use; 1 is all."),
    "preemptions": _counter("osp_num_preemptions_total", "Times that a sequence was put off for want of KV blocks."),
    "prefix_cache_queries": _counter("osp_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": _counter("osp_prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
}
