"""A load test's result of realistic shape, from a seed: what the report's tests read.

The load is invented, its figures are not: they are made by the modules that make those of real loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.loadtest.figures import ServiceLevel, figures, samples
from runtime.loadtest.ratio import ratios
from runtime.loadtest.record import RequestRecord
from runtime.loadtest.result import LoadTestResult, RateAtSlo, Repeat, Saturation, ServerAgreement, Side, SweepPoint

REPEATS = 5
REQUESTS = 200
OUTPUT_TOKENS = 48
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
SLO = ServiceLevel(ttft_ms=2000.0, tpot_ms=150.0)


def comparison(seed: int = 0) -> dict[str, Any]:
    """W4A4 against bfloat16, both measured whole, valid: the object that `result.json` holds."""
    random = np.random.default_rng(seed)
    a = _side(random, "w4a4", capacity=310.0, tpot_ms=24.0, weight_bytes=702_545_920)
    b = _side(random, "bfloat16", capacity=102.0, tpot_ms=78.0, weight_bytes=2_810_183_680)
    result = LoadTestResult(
        osp_version="0.1.0",
        date="2026-11-25T21:40:12+00:00",
        commands=["osp bench load model/w4a4 model/bf16 --num-prompts 200 --request-rate 4 --repeats 5 --out out/"],
        machine={
            "cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz",
            "cores": 2,
            "memory_GB": 25.3,
            "flags": ["avx2", "avx512f", "avx512_vnni"],
            "system": "Linux 6.1.0 x86_64",
        },
        workload={
            "kind": "random",
            "num_prompts": REQUESTS,
            "input_len": 128,
            "output_len": OUTPUT_TOKENS,
            "request_rate": 4.0,
            "burstiness": 1.0,
            "max_concurrency": None,
            "seed": 20261125,
            "repeats": REPEATS,
            "prefix_cache": False,
            "slo": {"ttft_ms": SLO.ttft_ms, "tpot_ms": SLO.tpot_ms},
        },
        A=a,
        B=b,
        ratio=ratios(a, b),
        quality={
            "perplexity": {"A": 31.402, "B": 29.911, "ratio": 31.402 / 29.911, "tokens": 69_399},
            "token_agreement": {"matching_prefix_share": 0.5614, "equal_texts": 17, "prompts": 64, "tokens": 3072},
        },
    )
    return result.to_dict()


def _side(random: np.random.Generator, name: str, capacity: float, tpot_ms: float, weight_bytes: int) -> Side:
    points = [_swept(rate, capacity, tpot_ms) for rate in RATES]
    kept = [point for point in points if point.meets_slo]
    return Side(
        name=name,
        target=f"model/{name}",
        url="http://127.0.0.1:8001",
        engine="native",
        precision=name,
        kernel="avx512_vnni",
        threads=2,
        load_seconds=1.372 * tpot_ms / 24,
        peak_rss_MB=weight_bytes / 1e6 + 211.4,
        weight_bytes=weight_bytes,
        cpu_share=0.1183,
        loop_lag_p99_ms=1.274,
        server_metrics=ServerAgreement(checked=["osp_generation_tokens_total"]),
        repeats=[_repeat(random, tpot_ms) for _ in range(REPEATS)],
        sweep=points,
        saturation=Saturation(capacity, None),
        max_rate_at_slo=RateAtSlo(kept[-1].request_rate, kept[-1].request_goodput) if kept else None,
    )


def _repeat(random: np.random.Generator, tpot_ms: float) -> Repeat:
    speed = random.normal(1.0, 0.02)
    records = [_record(random, index / 4, speed * tpot_ms) for index in range(REQUESTS)]
    duration_s = max(record.last_s for record in records) * tpot_ms / 24
    return Repeat(figures(records, duration_s, SLO), samples(records))


def _record(random: np.random.Generator, due_s: float, tpot_ms: float) -> RequestRecord:
    """Latencies are about lognormal; now and then another request's prefill is in the way."""
    gaps_s = random.lognormal(np.log(tpot_ms / 1000), 0.25, OUTPUT_TOKENS - 1)
    gaps_s[random.random(OUTPUT_TOKENS - 1) < 0.001] += 0.9
    first_s = due_s + random.lognormal(np.log(6 * tpot_ms / 1000), 0.45)
    return RequestRecord(
        scheduled_s=due_s,
        sent_s=due_s,
        first_s=first_s,
        last_s=first_s + gaps_s.sum(),
        gaps_s=gaps_s.tolist(),
        prompt_tokens=128,
        output_tokens=OUTPUT_TOKENS,
    )


def _swept(rate: float, capacity: float, tpot_ms: float) -> SweepPoint:
    """A queue that fills as the rate comes near what the server can do."""
    load = min(rate * OUTPUT_TOKENS / capacity, 0.97)
    ttft_ms, tpot_ms = 4 * tpot_ms / (1 - load), tpot_ms * (1 + load)
    meets_slo = 2.6 * ttft_ms <= SLO.ttft_ms and 1.4 * tpot_ms <= SLO.tpot_ms
    requests_per_s = load * capacity / OUTPUT_TOKENS
    return SweepPoint(
        request_rate=rate,
        completed=REQUESTS,
        failed=0,
        request_throughput=requests_per_s,
        request_goodput=requests_per_s if meets_slo else 0.31 * requests_per_s,
        output_throughput=load * capacity,
        median_ttft_ms=ttft_ms,
        p99_ttft_ms=2.6 * ttft_ms,
        median_tpot_ms=tpot_ms,
        p99_tpot_ms=1.4 * tpot_ms,
        meets_slo=meets_slo,
    )
