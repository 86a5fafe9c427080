"""Busy neighbours: what the kernel counts of them, while they are there and after."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.neighbour import NeighbourError, neighbour


def cpu_ticks_by_thread(pid: int) -> dict[str, int]:
    """User time of each thread, in hundredths of a second."""
    stats = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return {stat.split()[0]: int(stat.rpartition(")")[2].split()[11]) for stat in stats}


def busy_threads(pid: int, seconds: float = 0.5) -> int:
    before = cpu_ticks_by_thread(pid)
    time.sleep(seconds)
    after = cpu_ticks_by_thread(pid)
    return sum(after[thread] - before.get(thread, 0) > 5 for thread in after)


def test_spin_keeps_one_core_busy_and_no_other() -> None:
    with neighbour("spin") as pid:
        assert os.sched_getaffinity(pid) == {max(os.sched_getaffinity(0))}
        assert busy_threads(pid) == 1
    assert not Path(f"/proc/{pid}").exists()


def test_matmul_has_two_busy_threads_wherever_they_like() -> None:
    with neighbour("matmul") as pid:
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
        assert busy_threads(pid, 1.0) == 2
    assert not Path(f"/proc/{pid}").exists()


def test_a_neighbour_ends_where_the_measurement_fails() -> None:
    with pytest.raises(ZeroDivisionError), neighbour("spin") as pid:
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid}").exists()


def test_an_unknown_neighbour_is_refused() -> None:
    with (
        pytest.raises(NeighbourError, match="no neighbour is called 'loud'; there are: spin, matmul"),
        neighbour("loud"),
    ):
        pass
