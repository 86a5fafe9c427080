"""The figures of a load, defined and named as `vllm bench serve` defines and names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.loadtest.record import RequestRecord

PERCENTILES = (90, 95, 99)
"""Of each latency, beside mean, median and standard deviation."""

Figures = dict[str, float]
Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """The latencies that a request must keep to count as good; the default is that of MLPerf's interactive tests.

    Attributes:
        ttft_ms: time to first token, from the scheduled arrival.
        tpot_ms: time per output token after the first.
    """

    ttft_ms: float = 2000.0
    tpot_ms: float = 100.0

    def met_by(self, record: RequestRecord) -> bool:
        """Whether a request that succeeded was good. An answer of one token has no time per further token."""
        return record.ttft_s * 1000 <= self.ttft_ms and (record.tpot_s or 0.0) * 1000 <= self.tpot_ms


def samples(records: Sequence[RequestRecord]) -> Samples:
    """The latencies of all requests that succeeded, in milliseconds: `ttft_ms`, `tpot_ms`, `itl_ms`, `e2el_ms`.

    `itl_ms` has every gap between two pieces of an answer; the others have one value a request, and `tpot_ms` none for
    answers of one token.
    """
    good = [record for record in records if record.succeeded]
    return {
        "ttft_ms": [1000 * record.ttft_s for record in good],
        "tpot_ms": [1000 * tpot for record in good if (tpot := record.tpot_s) is not None],
        "itl_ms": [1000 * gap for record in good for gap in record.gaps_s],
        "e2el_ms": [1000 * record.e2el_s for record in good],
    }


def figures(records: Sequence[RequestRecord], duration_s: float, slo: ServiceLevel) -> Figures:
    """The figures of a load that took `duration_s` seconds from its first scheduled arrival to its last answer.

    A latency of which there is no sample is left out. `std` is the population's. Source: `calculate_metrics` of
    vllm/benchmarks/serve.py, vLLM 0.32.
    """
    good = [record for record in records if record.succeeded]
    inputs, outputs = sum(record.prompt_tokens for record in good), sum(record.output_tokens for record in good)
    values: Figures = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration_s,
        "request_goodput": sum(slo.met_by(record) for record in good) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, latencies_N in samples(records).items():
        if latencies_N:
            values |= _distribution(name, latencies_N)
    return values


def median_figures(repeats: Sequence[Figures]) -> Figures:
    """Of every figure that all repeats have, the median over the repeats."""
    if not repeats:
        return {}
    shared = [name for name in repeats[0] if all(name in repeat for repeat in repeats)]
    return {name: float(np.median([repeat[name] for repeat in repeats])) for name in shared}


def _distribution(name: str, latencies_N: Sequence[float]) -> Figures:
    values = {
        f"mean_{name}": float(np.mean(latencies_N)),
        f"median_{name}": float(np.median(latencies_N)),
        f"std_{name}": float(np.std(latencies_N)),
    }
    return values | {f"p{p}_{name}": float(np.percentile(latencies_N, p)) for p in PERCENTILES}


def _most_at_once(records: Sequence[RequestRecord]) -> int:
    """How many requests were under way at the busiest moment."""
    edges = sorted([(record.sent_s, 1) for record in records] + [(record.last_s, -1) for record in records])
    return int(max(np.cumsum([change for _, change in edges]), default=0))
