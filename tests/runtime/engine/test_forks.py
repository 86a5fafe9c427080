"""n > 1: one prefill, then sequences of their own that share its blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drive import Drive
from history_runner import HistoryRunner, greedy_continuation

from runtime.engine.base import FinishReason, GenerationRequest, RequestRejectedError, SamplingParams


def request(name: str, prompt: int = 3, max_tokens: int = 4, n: int = 1) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens, temperature=0), n=n)


def test_the_prompt_is_computed_once_and_its_blocks_are_shared() -> None:
    drive = Drive(runner := HistoryRunner(100), max_sequences=4)
    drive.scheduler.add(request("a", prompt=10, max_tokens=3, n=4))
    drive.step()
    assert drive.pool.usage == 0.03
    drive.step()
    assert drive.pool.usage == 0.06, "two full blocks together, the half one each, the last in the original"
    assert runner.copied == 3
    assert runner.batches == [[(0, 10, 1)], [(10, 1, 1)] * 4]
    drive.finish()
    assert all(drive.heard["a", index].reason is FinishReason.LENGTH for index in range(4))


def test_full_blocks_need_no_copy() -> None:
    drive = Drive(runner := HistoryRunner(100))
    drive.scheduler.add(request("a", prompt=8, max_tokens=6, n=3))
    drive.finish()
    assert runner.copied == 0


def test_it_waits_until_all_can_run() -> None:
    drive = Drive(HistoryRunner(100), max_sequences=3)
    drive.scheduler.add(request("one", max_tokens=3))
    drive.scheduler.add(request("three", max_tokens=3, n=3))
    drive.scheduler.add(request("last", max_tokens=1))
    assert [{s.request.request_id for s in drive.step().sequences} for _ in range(5)] == [
        {"one"},
        {"one"},
        {"one"},
        {"three"},
        {"three"},
    ]
    with pytest.raises(RequestRejectedError, match="n is 4; this engine runs 3 at a time"):
        drive.scheduler.add(request("four", n=4))


def test_a_child_is_put_off_alone() -> None:
    drive = Drive(HistoryRunner(8))
    wanted = request("a", prompt=6, max_tokens=20, n=3)
    drive.scheduler.add(wanted)
    drive.finish()
    assert drive.scheduler.stats().preemptions > 0
    for index in range(3):
        assert drive.heard["a", index].tokens == greedy_continuation(wanted.prompt_token_ids, 20)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_one_child_is_aborted(steps: int) -> None:
    drive = Drive(HistoryRunner(100), token_budget=32)
    drive.scheduler.add(request("a", prompt=40, max_tokens=5, n=3))
    for _ in range(steps):
        drive.step()
    assert drive.scheduler.abort("a", 1) == [1]
    assert drive.scheduler.abort("a", 1) == []
    assert drive.scheduler.abort("a", 7) == []
    drive.finish()
    assert [drive.heard["a", index].reason for index in (0, 2)] == [FinishReason.LENGTH] * 2
    assert len(drive.heard["a", 1].tokens) == max(0, steps - 1)
    assert drive.pool.num_free == 100


def test_all_children_are_aborted_one_by_one() -> None:
    drive = Drive(HistoryRunner(100))
    drive.scheduler.add(request("a", n=3))
    assert [drive.scheduler.abort("a", index) for index in (0, 2, 1)] == [[0], [2], [1]]
    assert drive.scheduler.idle


def test_a_failure_of_one_ends_all() -> None:
    class Failing:
        def allowed(self, token_ids: object) -> None:
            if len(token_ids) == 2:  # type: ignore[arg-type]
                raise RuntimeError("no more")

    drive = Drive(HistoryRunner(100))
    wanted = request("a", n=2)
    drive.scheduler.add(replace(wanted, sampling=replace(wanted.sampling, guide=Failing())))
    drive.finish()
    assert "RuntimeError: no more" in str(drive.heard["a", 0].error)
    assert drive.pool.num_free == 100
