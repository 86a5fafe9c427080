"""The scheduler by itself: random traffic keeps every promise of its docstring."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.base import (
    FinishReason,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    SamplingParams,
    TokenChunk,
)
from runtime.engine.kv_cache import BlockAllocator
from runtime.engine.scheduler import Scheduler, SchedulerLimits, Step

BLOCK_SIZE = 4
STOP = 9


def request(name: str, prompt: int = 3, max_tokens: int = 4) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP}))
    return GenerationRequest(name, tuple(range(prompt)), sampling)


def new_scheduler(num_blocks: int = 100, **limits: int) -> tuple[Scheduler, BlockAllocator]:
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
    return Scheduler(allocator, SchedulerLimits(**limits)), allocator


def run(scheduler: Scheduler, token: int = 1) -> tuple[Step, dict[str, TokenChunk]]:
    step = scheduler.schedule()
    return step, scheduler.advance(step, dict.fromkeys(step.sampled(), token))


def lengths(step: Step) -> dict[str, int]:
    pairs = zip(step.sequences, step.slices, strict=True)
    return {sequence.request.request_id: len(slice_.token_ids) for sequence, slice_ in pairs}


traffic = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12)),
        st.tuples(st.sampled_from(["abort", "abort during a step"]), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("stop token"), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(traffic, st.integers(8, 30), st.integers(1, 6), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_random_traffic(actions: list[tuple[str, int, int]], num_blocks: int, sequences: int, spare: int) -> None:
    budget = sequences + spare
    scheduler, allocator = new_scheduler(num_blocks, max_sequences=sequences, token_budget=budget, max_waiting=10)
    live: dict[str, GenerationRequest] = {}
    cached: Counter[str] = Counter()  # positions computed so far
    output: dict[str, list[int]] = {}
    admitted: list[str] = []

    def step(token: int = 1, abort: str | None = None) -> None:
        decoding = {name for name in live if output[name]}
        work = scheduler.schedule()
        sizes = lengths(work)
        assert sum(sizes.values()) <= budget
        assert len(sizes) <= sequences
        assert bool(sizes) == bool(live)
        assert decoding <= set(sizes), "every decoding sequence gets a token in every step"
        used = np.concatenate([slice_.block_table for slice_ in work.slices]) if sizes else np.array([])
        assert len(set(used.tolist())) == len(used) <= num_blocks - allocator.num_free
        for sequence, slice_ in zip(work.sequences, work.slices, strict=True):
            name, end = sequence.request.request_id, slice_.start + len(slice_.token_ids)
            inputs = [*sequence.request.prompt_token_ids, *output[name]]
            assert slice_.start == cached[name]
            assert slice_.token_ids.tolist() == inputs[slice_.start : end]
            assert len(slice_.block_table) * BLOCK_SIZE >= end
            assert slice_.num_logits == (end == len(inputs))
            cached[name] = end
            if name not in admitted:
                admitted.append(name)
        if abort in live:
            scheduler.abort(abort)
            del live[abort]
        for name, chunk in scheduler.advance(work, dict.fromkeys(work.sampled(), token)).items():
            output[name] += chunk.token_ids
            ended = token == STOP or len(output[name]) == live[name].sampling.max_tokens
            assert chunk.finish_reason == (
                (FinishReason.STOP if token == STOP else FinishReason.LENGTH) if ended else None
            )
            if ended:
                del live[name]

    for number, (action, a, b) in enumerate(actions):
        pick = list(live)[a % len(live)] if live else None
        if action == "add":
            wanted = request(f"r{number}", a, b)
            try:
                scheduler.add(wanted)
            except QueueFullError:
                assert scheduler.stats().waiting == 10
            except RequestRejectedError:
                assert a + b - 1 > num_blocks * BLOCK_SIZE
            else:
                live[wanted.request_id], output[wanted.request_id] = wanted, []
        elif action == "abort":
            assert scheduler.abort(pick or "nobody") == (pick is not None)
            live.pop(pick or "nobody", None)
        else:
            step(STOP if action == "stop token" else 1, pick if action == "abort during a step" else None)
        assert scheduler.stats().running + scheduler.stats().waiting == len(live)

    # Nobody starves: a step computes at least one of the tokens still to come, first come is first admitted.
    for _ in range(sum(len(r.prompt_token_ids) + r.sampling.max_tokens for r in live.values())):
        step()
    assert not live
    assert scheduler.idle
    assert allocator.num_free == num_blocks
    assert admitted == sorted(admitted, key=lambda name: int(name[1:]))


def test_a_long_prompt_is_cut_and_does_not_stop_the_others() -> None:
    scheduler, _ = new_scheduler(max_sequences=4, token_budget=10)
    scheduler.add(request("short", prompt=3, max_tokens=20))
    assert lengths(run(scheduler)[0]) == {"short": 3}
    scheduler.add(request("long", prompt=25))
    scheduler.add(request("next", prompt=3))
    assert [lengths(run(scheduler)[0]) for _ in range(4)] == [
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 7, "next": 2},
        {"short": 1, "long": 1, "next": 1},
    ]


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    scheduler, _ = new_scheduler(num_blocks=4)
    scheduler.add(request("first", prompt=8, max_tokens=2))  # 3 of 4 blocks
    scheduler.add(request("large", prompt=8, max_tokens=2))
    scheduler.add(request("small", prompt=1, max_tokens=1))
    assert lengths(run(scheduler)[0]) == {"first": 8}
    assert lengths(run(scheduler)[0]) == {"first": 1}
    assert lengths(run(scheduler)[0]) == {"large": 8, "small": 1}


def test_the_last_token_needs_no_block() -> None:
    scheduler, allocator = new_scheduler(num_blocks=2)
    scheduler.add(request("exact", prompt=7, max_tokens=2))
    assert run(scheduler)[1]["exact"] == TokenChunk((1,))
    assert run(scheduler)[1]["exact"] == TokenChunk((1,), FinishReason.LENGTH)
    assert allocator.num_free == 2
    with pytest.raises(RequestRejectedError, match="KV cache of 8 positions"):
        scheduler.add(request("too long", prompt=7, max_tokens=3))


def test_queue_limit() -> None:
    scheduler, _ = new_scheduler(max_sequences=1, max_waiting=2)
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        scheduler.add(request("c"))
    run(scheduler)
    scheduler.add(request("c"))
    assert (scheduler.stats().running, scheduler.stats().waiting) == (1, 2)


def test_an_id_may_be_used_again_while_the_old_step_is_under_way() -> None:
    scheduler, allocator = new_scheduler()
    scheduler.add(request("a"))
    step = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(request("a", prompt=5))
    assert scheduler.advance(step, dict.fromkeys(step.sampled(), 1)) == {}
    assert lengths(run(scheduler)[0]) == {"a": 5}
    assert allocator.usage > 0


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"max_waiting": 0}, {"token_budget": 31}])
def test_limits_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SchedulerLimits(**wrong)
