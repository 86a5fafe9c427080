"""The sweep against a queue whose capacity is known."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from runtime.loadtest.arrivals import arrival_times
from runtime.loadtest.figures import Figures, ServiceLevel, figures
from runtime.loadtest.record import RequestRecord
from runtime.loadtest.sweep import RESOLUTION, Sweep, max_rate_at_slo, saturation

SERVICE_S, REQUESTS = 0.1, 1500
SLO = ServiceLevel(ttft_ms=1000, tpot_ms=100)


def queue(rate: float, service_s: float = SERVICE_S) -> tuple[Figures, list[RequestRecord]]:
    """One server, one request at a time, `service_s` each: what Poisson arrivals see of it (M/D/1)."""
    records, free_s = [], 0.0
    for due_s in arrival_times(REQUESTS, rate, 1.0, seed=3).tolist():
        free_s = max(free_s, due_s) + service_s
        records.append(RequestRecord(due_s, due_s, free_s, free_s, [], 1, 1))
    return figures(records, max(record.last_s for record in records), SLO), records


async def measure(rate: float) -> Figures:
    return queue(rate)[0]


def test_the_queue_waits_as_theory_says() -> None:
    load = 0.4
    _, records = queue(load / SERVICE_S)

    waits = [record.ttft_s - SERVICE_S for record in records]
    assert np.mean(waits) == pytest.approx(load * SERVICE_S / (2 * (1 - load)), rel=0.15)  # Pollaczek and Khinchine


def test_saturation_and_the_highest_rate_that_holds() -> None:
    sweep = Sweep(measure, SLO)
    asyncio.run(sweep.run(1 / SERVICE_S))

    # By trying rates one by one.
    rates = np.arange(7.0, 10.5, 0.25)
    highest = max(rate for rate in rates if queue(rate)[0]["p99_ttft_ms"] <= SLO.ttft_ms)
    found, most = max_rate_at_slo(sweep.points), saturation(sweep.points, {}, None)
    assert found is not None
    assert most is not None
    assert highest / RESOLUTION <= found.request_rate <= highest + 0.25
    assert found.request_goodput == pytest.approx(found.request_rate, rel=0.03)
    assert most.output_throughput == pytest.approx(1 / SERVICE_S, rel=0.02)
    assert len(sweep.points) < 12


def test_a_server_that_never_keeps_the_level_ends_the_sweep() -> None:
    async def slow(rate: float) -> Figures:
        return queue(rate, service_s=2.0)[0]

    sweep = Sweep(slow, SLO)
    asyncio.run(sweep.run(0.5))

    assert max_rate_at_slo(sweep.points) is None
    assert len(sweep.points) < 6


def test_a_failed_request_fails_the_level() -> None:
    async def failing(rate: float) -> Figures:
        return {**queue(rate)[0], "failed": 1}

    sweep = Sweep(failing, SLO)
    asyncio.run(sweep.run(1 / SERVICE_S))

    assert not any(point.meets_slo for point in sweep.points)
