"""In which order engines are measured, and what their figures come to: against examples worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.alternation import Series, alternate
from benchmarks.comparison import Comparison
from benchmarks.markdown import TIMES
from benchmarks.neighbour import NEIGHBOURS
from benchmarks.peer_environments import PEERS
from benchmarks.workloads import ROWS, Decode, Prefill, Row, rows_named

DECODE = Row("d", "decode", Decode(tokens=32, batch=2), goals={"peer": 2.0})
BESIDE = Row("b", "decode beside", Decode(tokens=32), neighbour="spin", kept_goal=0.6)


class Machine:
    """Writes down what happens on it, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def engine(self, name: str, *rates: float) -> ScriptedEngine:
        return ScriptedEngine(name, self, iter(rates))

    def limits(self) -> dict[str, float]:
        self.events.append("limits")
        return {"read_GBps": float(len(self.events)), "dot_GOPS": 1000.0}

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        self.events.append(f"{name} starts")
        yield
        self.events.append(f"{name} ends")


class ScriptedEngine:
    def __init__(self, name: str, machine: Machine, rates: Iterator[float]) -> None:
        self.name, self._machine, self._rates = name, machine, rates
        self.requests: list[Mapping[str, Any]] = []

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        self._machine.events.append(self.name)
        return {"tok_s": next(self._rates)}


def test_engines_take_turns_and_the_first_turn_does_not_count() -> None:
    machine = Machine()
    ours, peer = machine.engine("osp", 1, 30, 40), machine.engine("peer", 1, 10, 20)
    series = alternate(DECODE, [ours, peer], 2, limits=machine.limits)
    assert machine.events == ["osp", "peer", "limits", "osp", "peer", "limits", "osp", "peer"]
    assert series.rates == {"osp": [30, 40], "peer": [10, 20]}
    assert series.quiet == {}
    assert series.limits == [{"read_GBps": 3.0, "dot_GOPS": 1000.0}, {"read_GBps": 6.0, "dot_GOPS": 1000.0}]
    assert series.limit("read_GBps") == 4.5
    assert peer.requests == 3 * [{"measure": "decode", "batch": 2, "context": 0, "tokens": 32}]


def test_beside_a_neighbour_each_round_is_measured_without_it_first() -> None:
    machine = Machine()
    ours, peer = machine.engine("osp", 1, 40, 24, 50, 35), machine.engine("peer", 1, 20, 10, 30, 12)
    series = alternate(BESIDE, [ours, peer], 2, beside=machine.beside)
    turn = ["osp", "peer"]
    assert machine.events == [*turn, *2 * [*turn, "spin starts", *turn, "spin ends"]]
    assert series.quiet == {"osp": [40, 50], "peer": [20, 30]}
    assert series.rates == {"osp": [24, 35], "peer": [10, 12]}
    assert series.kept("osp") == pytest.approx((0.6 + 0.7) / 2)
    assert series.kept("peer") == pytest.approx((0.5 + 0.4) / 2)


def test_ratios_are_of_one_round_and_the_median_is_over_them() -> None:
    # The machine was twice as fast in the last round, for both. Ratios of the rounds: 3, 1.5, 2.5.
    series = Series(DECODE, {"osp": [30, 15, 50], "peer": [10, 10, 20]})
    assert series.ratio("osp", "peer") == 2.5
    assert series.ratio("osp", "peer") != series.rate("osp") / series.rate("peer")
    assert series.kept("osp") is None
    assert series.limit("read_GBps") is None


def test_what_is_done_at_once_is_asked_again() -> None:
    # Of two tokens each: half a second does not count; then 0.2 s, 0.1 s and 0.25 s, which are half a second together.
    engine = Machine().engine("osp", 4, 10, 20, 8)
    series = alternate(Row("d", "decode", Decode(tokens=2)), [engine], 1)
    assert series.rates["osp"] == [pytest.approx(6 / 0.55)]
    assert len(engine.requests) == 4


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="peer, d: a rate of"):
        alternate(DECODE, [Machine().engine("peer", rate)], 1)


def comparison() -> Comparison:
    decode = Series(DECODE, {"osp": [30, 31, 32], "peer": [10, 10, 10], "other": [1000, 1000, 1000]})
    decode.limits = 3 * [{"read_GBps": 24.04, "dot_GOPS": 1254.0}]
    beside = Series(BESIDE, {"osp": [20], "peer": [5]}, {"osp": [40], "peer": [10]})
    engines = {"osp": {"engine": "ours", "version": "1"}, "peer": {"engine": "Peer"}, "other": {"engine": "Other"}}
    made = Comparison("python -m x", "1.4b", 2, 3, "osp", engines, [decode, beside], {"osp": 900.0})
    return made


def test_the_table_has_rates_ratios_goals_and_limits() -> None:
    table = [line for line in comparison().markdown().splitlines() if line.startswith("|")]
    assert table[0] == "|  | osp | peer | other | machine reads, GB/s | machine's dot products, GOPS |"
    assert table[2] == f"| decode | 31.0 | 10.0 (3.10 {TIMES}, goal 2.0) | 1,000 (0.03 {TIMES}) | 24.0 | 1,254 |"
    assert (
        table[3] == f"| decode beside | 20.0, keeps 0.50 (goal 0.6) | 5.0, keeps 0.50 (4.00 {TIMES}) | cannot |  |  |"
    )
    assert "python -m x" in comparison().markdown()
    assert "- osp: ours, 1" in comparison().markdown()


def test_the_json_has_every_round() -> None:
    told = json.loads(json.dumps(comparison().to_dict()))
    assert told["engines"]["osp"] == {"engine": "ours", "version": "1", "rss_MB": 900.0}
    decode, beside = told["rows"]
    assert decode["rates"]["osp"] == [30, 31, 32]
    assert decode["medians"] == {"osp": 31, "peer": 10, "other": 1000}
    assert decode["ratios"] == {"peer": 3.1, "other": 0.031}
    assert decode["request"] == {"measure": "decode", "batch": 2, "context": 0, "tokens": 32}
    assert decode["kept"] == {}
    assert beside["kept"] == {"osp": 0.5, "peer": 0.5}
    assert beside["neighbour"] == "spin"


def test_rows_name_peers_and_neighbours_that_there_are() -> None:
    for row in ROWS:
        assert set(row.goals) <= set(PEERS)
        assert row.neighbour is None or row.neighbour in NEIGHBOURS
        assert not any(row.needs_whole_model and not PEERS[name].whole_model for name in row.goals)
    assert len({row.name for row in ROWS}) == len({row.title for row in ROWS}) == len(ROWS)


def test_rows_are_chosen_by_pattern() -> None:
    assert [row.name for row in rows_named("beside-*")] == ["beside-spin", "beside-matmul"]
    assert [row.work for row in rows_named("prefill-512")] == [Prefill(512)]
    with pytest.raises(ValueError, match="no row is called nothing; there are: decode-1, "):
        rows_named("nothing")
