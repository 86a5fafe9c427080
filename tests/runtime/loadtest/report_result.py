"""A load test's result of realistic shape, from a seed: what the report's tests read."""

from __future__ import annotations

from typing import Any

import numpy as np

REPEATS = 5
REQUESTS = 200
OUTPUT_TOKENS = 48
RATES = (1.0, 2.0, 4.0, 8.0, 12.0)
COMPARED = ("output_throughput", "request_throughput", "request_goodput", "median_ttft_ms", "median_tpot_ms")
SLO = {"ttft_ms": 1000.0, "tpot_ms": 100.0}


def comparison(seed: int = 0) -> dict[str, Any]:
    """W4A4 against bfloat16, both measured whole, valid."""
    random = np.random.default_rng(seed)
    a = _side(random, "w4a4", "model/w4a4", capacity=410.0, tpot_ms=24.0, weight_bytes=702_545_920)
    b = _side(random, "bf16", "model/bf16", capacity=132.0, tpot_ms=78.0, weight_bytes=2_810_183_680)
    return {
        "osp_version": "0.1.0",
        "date": "2026-11-25T21:40:12+00:00",
        "commands": ["osp bench load model/w4a4 model/bf16 --num-prompts 200 --request-rate 4 --repeats 5 --out out/"],
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz",
            "cores": 2,
            "memory_GB": 25.3,
            "flags": ["avx2", "avx512f", "avx512_vnni"],
            "system": "Linux 6.1.0 x86_64",
        },
        "workload": {
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
            "slo": SLO,
        },
        "A": a,
        "B": b,
        "ratio": {key: _ratio(a, b, key) for key in COMPARED} | {"peak_rss_MB": _exact(a, b, "peak_rss_MB")},
        "quality": {
            "perplexity": {"A": 31.402, "B": 29.911, "ratio": 31.402 / 29.911, "tokens": 69_399},
            "token_agreement": {"matching_prefix_share": 0.5614, "equal_texts": 17, "prompts": 64, "tokens": 3072},
        },
        "valid": True,
        "invalid_reasons": [],
    }


def _ratio(a: dict[str, Any], b: dict[str, Any], key: str) -> dict[str, float]:
    ratios = [first[key] / second[key] for first, second in zip(a["repeats"], b["repeats"], strict=True)]
    return {"median": float(np.median(ratios)), "low": 0.99 * min(ratios), "high": 1.01 * max(ratios)}


def _exact(a: dict[str, Any], b: dict[str, Any], key: str) -> dict[str, float]:
    ratio = a[key] / b[key]
    return {"median": ratio, "low": ratio, "high": ratio}


def _side(
    random: np.random.Generator, name: str, target: str, capacity: float, tpot_ms: float, weight_bytes: int
) -> dict[str, Any]:
    runs = [_repeat(random, capacity, tpot_ms) for _ in range(REPEATS)]
    names = [key for key, value in runs[0].items() if key != "samples"]
    medians = {key: float(np.median([run[key] for run in runs])) for key in names}
    return {
        "name": name,
        "target": target,
        "url": "http://127.0.0.1:8001",
        "engine": "native",
        "precision": name,
        "kernel": "avx512_vnni",
        "threads": 2,
        "load_seconds": 1.37,
        "peak_rss_MB": weight_bytes / 1e6 + 211.4,
        "gpu_memory_MB": None,
        "weight_bytes": weight_bytes,
        "energy_J_per_token": None,
        **medians,
        "completed": REQUESTS,
        "failed": 0,
        "client": {"cpu_share": 0.1183, "loop_lag_p99_ms": 1.274},
        "server_metrics": {"agrees": True, "differences": []},
        "repeats": runs,
        "sweep": [_swept(rate, capacity, tpot_ms) for rate in RATES],
        "saturation": {"output_throughput": capacity, "request_rate": RATES[-1]},
        "max_rate_at_slo": {"request_rate": 0.8 * capacity / OUTPUT_TOKENS, "request_goodput": 0.79 * capacity / 48},
    }


def _repeat(random: np.random.Generator, capacity: float, tpot_ms: float) -> dict[str, Any]:
    samples = {
        "ttft_ms": random.lognormal(np.log(6 * tpot_ms), 0.45, REQUESTS),
        "tpot_ms": random.lognormal(np.log(tpot_ms), 0.12, REQUESTS),
        "itl_ms": random.lognormal(np.log(tpot_ms), 0.25, REQUESTS * (OUTPUT_TOKENS - 1)),
    }
    samples["itl_ms"][::1000] += 900.0  # now and then another request's prefill is in the way
    samples["e2el_ms"] = samples["ttft_ms"] + (OUTPUT_TOKENS - 1) * samples["tpot_ms"]
    tokens_per_s = 0.46 * capacity * random.normal(1.0, 0.02)
    figures: dict[str, Any] = {
        "completed": REQUESTS,
        "failed": 0,
        "request_throughput": tokens_per_s / OUTPUT_TOKENS,
        "output_throughput": tokens_per_s,
        "total_token_throughput": tokens_per_s * (128 + OUTPUT_TOKENS) / OUTPUT_TOKENS,
        "request_goodput": 0.93 * tokens_per_s / OUTPUT_TOKENS,
    }
    for key, values in samples.items():
        figures |= {f"mean_{key}": float(values.mean()), f"std_{key}": float(values.std())}
        figures |= {f"median_{key}": float(np.median(values))}
        figures |= {f"p{p}_{key}": float(np.percentile(values, p)) for p in (90, 99)}
    return figures | {"samples": {key: values.tolist() for key, values in samples.items()}}


def _swept(rate: float, capacity: float, tpot_ms: float) -> dict[str, Any]:
    """A queue that fills as the rate comes near what the server can do."""
    offered = rate * OUTPUT_TOKENS
    load = min(offered / capacity, 0.985)
    ttft_ms, tpot_ms = 4 * tpot_ms / (1 - load), tpot_ms * (1 + load)
    return {
        "request_rate": rate,
        "completed": REQUESTS,
        "output_throughput": load * capacity,
        "median_ttft_ms": ttft_ms,
        "p99_ttft_ms": 2.6 * ttft_ms,
        "p99_tpot_ms": 1.4 * tpot_ms,
        "meets_slo": bool(2.6 * ttft_ms <= SLO["ttft_ms"] and 1.4 * tpot_ms <= SLO["tpot_ms"]),
    }
