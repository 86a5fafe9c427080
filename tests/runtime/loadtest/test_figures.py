"""Figures of requests whose times are known, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.loadtest.figures import ServiceLevel, figures, median_figures, samples
from runtime.loadtest.record import RequestRecord


def request(due_s: float, first_s: float, gaps_s: list[float], sent_s: float | None = None) -> RequestRecord:
    """A request of as many tokens as pieces."""
    record = RequestRecord(due_s, sent_s=due_s if sent_s is None else sent_s, prompt_tokens=10)
    for time_s in np.cumsum([first_s, *gaps_s]):
        record.piece(float(time_s))
    record.output_tokens = 1 + len(gaps_s)
    return record


REQUESTS = [
    request(0.0, 1.0, [0.1, 0.3]),  # TTFT 1 s, TPOT 0.2 s, 1.4 s in all
    request(1.0, 1.5, [0.05], sent_s=1.2),  # 0.5 s, counted from when it was due; 0.05 s; 0.55 s
    request(2.0, 2.25, []),  # one token: no TPOT
    RequestRecord(3.0, error="the connection failed"),
]


def test_each_figure() -> None:
    found = figures(REQUESTS, 4.0, ServiceLevel(ttft_ms=600, tpot_ms=100))

    assert found["completed"] == 3
    assert found["failed"] == 1
    assert found["total_input_tokens"] == 30
    assert found["total_output_tokens"] == 6
    assert found["request_throughput"] == 3 / 4
    assert found["output_throughput"] == 6 / 4
    assert found["total_token_throughput"] == 36 / 4
    assert found["request_goodput"] == 2 / 4  # the first is too late, and too slow
    assert found["max_concurrent_requests"] == 2
    assert found["mean_ttft_ms"] == pytest.approx(1750 / 3)
    assert found["median_ttft_ms"] == pytest.approx(500)
    assert found["std_ttft_ms"] == pytest.approx(np.std([1000, 500, 250]))
    assert found["p90_ttft_ms"] == pytest.approx(900)  # linear between the 500 and the 1,000
    assert found["mean_tpot_ms"] == pytest.approx(125)
    assert found["p99_itl_ms"] == pytest.approx(np.percentile([100, 300, 50], 99))
    assert found["median_e2el_ms"] == pytest.approx(550)


def test_samples_are_those_of_requests_that_succeeded() -> None:
    found = samples(REQUESTS)

    assert found["ttft_ms"] == pytest.approx([1000, 500, 250])
    assert found["tpot_ms"] == pytest.approx([200, 50])
    assert found["itl_ms"] == pytest.approx([100, 300, 50])
    assert found["e2el_ms"] == pytest.approx([1400, 550, 250])


def test_without_an_answer_there_are_counts_and_no_latencies() -> None:
    found = figures(REQUESTS[3:], 4.0, ServiceLevel())

    assert found["failed"] == 1
    assert found["output_throughput"] == 0
    assert not [name for name in found if name.endswith("_ms")]


def test_medians_over_repeats() -> None:
    assert median_figures([{"a": 1.0, "b": 5.0}, {"a": 9.0}, {"a": 2.0, "b": 1.0}]) == {"a": 2.0}
    assert median_figures([]) == {}
