"""The verdict's sentences, for what can come out of a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.loadtest.report_verdict import verdict

FASTER = {"median": 3.104, "low": 2.9, "high": 3.3}
SAME = {"median": 1.02, "low": 0.97, "high": 1.06}
SLOWER = {"median": 0.5, "low": 0.4, "high": 0.6}
ONCE = {"median": 3.104, "low": None, "high": None}


def result(
    ratio: dict[str, Any] | None, a: float | None = 31.5, b: float | None = 30.0, **changes: Any
) -> dict[str, Any]:
    """w4a4 against bf16, with the output throughput's ratio and two perplexities."""
    quality: dict[str, Any] = {"unavailable": "no held-out text was given"}
    if a is not None and b is not None:
        quality = {"perplexity": {"A": a, "B": b, "ratio": a / b, "tokens": 1000}}
    sides = {letter: {"name": name, "completed": 90, "failed": 0} for letter, name in (("A", "w4a4"), ("B", "bf16"))}
    return {**sides, "ratio": {"output_throughput": ratio} if ratio else {}, "quality": quality, **changes}


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        (
            result(FASTER),
            [
                "w4a4 gives 3.10 x (2.90 to 3.30) the output tokens/s of bf16 "
                "and costs 5.00 % of perplexity (31.50 against 30.00)."
            ],
        ),
        (
            result(SLOWER, 29.4, 30.0),
            [
                "w4a4 gives 0.500 x (0.400 to 0.600) the output tokens/s of bf16 and has a perplexity 2.00 % lower "
                "(29.40 against 30.00)."
            ],
        ),
        (
            result(FASTER, 30.003, 30.0),
            [
                "w4a4 gives 3.10 x (2.90 to 3.30) the output tokens/s of bf16 "
                "and has the same perplexity (30.00 against 30.00)."
            ],
        ),
        (
            result(SAME),
            [
                "w4a4 and bf16 give the same output tokens/s as far as this run can tell: 1.02 x (0.970 to 1.06).",
                "w4a4 costs 5.00 % of perplexity (31.50 against 30.00).",
            ],
        ),
        (
            result(FASTER, None),
            [
                "w4a4 gives 3.10 x (2.90 to 3.30) the output tokens/s of bf16.",
                "The quality of w4a4 was not measured: no held-out text was given.",
            ],
        ),
        (
            result(ONCE),
            [
                "w4a4 gives 3.10 x the output tokens/s of bf16 and costs 5.00 % of perplexity (31.50 against 30.00).",
                "One repeat gives no interval: repeat before relying on it.",
            ],
        ),
        (
            result(None),
            [
                "The output tokens/s of w4a4 and bf16 were not compared.",
                "w4a4 costs 5.00 % of perplexity (31.50 against 30.00).",
            ],
        ),
    ],
    ids=["faster", "slower and better", "faster and as good", "as fast", "quality unknown", "one repeat", "no repeat"],
)
def test_throughput_and_what_it_costs(given: dict[str, Any], sentences: list[str]) -> None:
    assert verdict(given) == sentences


def test_latency_and_memory() -> None:
    given = result(FASTER)
    given["ratio"] |= {"median_ttft_ms": SLOWER, "median_tpot_ms": SAME, "peak_rss_MB": ONCE}
    assert verdict(given)[1:] == [
        "Its median time to first token is 0.500 x (0.400 to 0.600) and its median time per output token is 1.02 x "
        "(0.970 to 1.06) that of bf16.",
        "It takes 3.10 x the memory of bf16.",
    ]


def test_failures_are_counted() -> None:
    given = result(FASTER)
    given["B"] |= {"completed": 1990.0, "failed": 10.0}
    assert verdict(given)[-1] == "10 of 2,000 requests to bf16 failed."


def test_sides_of_one_name_are_told_apart() -> None:
    given = result(FASTER)
    given["B"]["name"] = "w4a4"
    assert verdict(given)[0].startswith("w4a4 (A) gives 3.10 x (2.90 to 3.30) the output tokens/s of w4a4 (B)")


def test_one_side_alone() -> None:
    given = result(None)
    given |= {"B": None, "quality": {"perplexity": {"A": 31.5, "B": None, "ratio": None, "tokens": 9}}}
    assert verdict(given) == ["The output tokens/s of w4a4 were not measured.", "Its perplexity is 31.50."]
    given["A"] |= {"output_throughput": 188.3, "median_ttft_ms": 41.28}
    assert verdict(given) == [
        "w4a4 gives 188 output tokens/s.",
        "Its median time to first token is 41.3 ms.",
        "Its perplexity is 31.50.",
    ]
