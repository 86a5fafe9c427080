"""The scheduler keeps every promise of its docstring under random traffic, and shows each in a small example."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
from drive import Drive
from history_runner import HistoryRunner, greedy_continuation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.engine.base import (
    FinishReason,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    SamplingParams,
    TokenChunk,
)
from runtime.engine.scheduler import SchedulerLimits
from runtime.engine.step import Step

BLOCK_SIZE = 4


def request(name: str, prompt: int = 3, max_tokens: int = 4, n: int = 1, priority: int = 0) -> GenerationRequest:
    """The numbers in its prompt are its own."""
    tokens = np.random.default_rng(crc32(name.encode())).integers(0, 32, prompt).tolist()
    return GenerationRequest(name, tuple(tokens), SamplingParams(max_tokens, temperature=0), n=n, priority=priority)


def lengths(step: Step) -> dict[str, int]:
    pairs = zip(step.sequences, step.slices, strict=True)
    return {sequence.request.request_id: len(slice_.token_ids) for sequence, slice_ in pairs}


class RandomTraffic(RuleBasedStateMachine):
    """Requests come, are aborted, and are served, in a cache that is too small for them."""

    @initialize(
        num_blocks=st.integers(6, 16), sequences=st.integers(2, 6), spare=st.integers(0, 12), caching=st.booleans()
    )
    def start(self, num_blocks: int, sequences: int, spare: int, caching: bool) -> None:
        self.num_blocks, self.sequences, self.budget = num_blocks, sequences, sequences + spare
        self.drive = Drive(
            HistoryRunner(num_blocks, BLOCK_SIZE),
            max_sequences=sequences,
            token_budget=self.budget,
            logit_rows=sequences + spare // 2,
            max_waiting=6,
            prefix_caching=caching,
        )
        self.live: dict[str, GenerationRequest] = {}
        self.first_run: dict[int, list[str]] = defaultdict(list)  # by priority
        self.served: set[tuple[str, int]] = set()  # who got a token in the last step
        self.count = 0

    @rule(prompt=st.integers(1, 30), tokens=st.integers(1, 20), n=st.integers(1, 3), priority=st.integers(0, 1))
    def add(self, prompt: int, tokens: int, n: int, priority: int) -> None:
        self.count += 1
        wanted = request(f"{self.count}", prompt, tokens, n, priority)
        waiting = self.drive.scheduler.stats().waiting
        try:
            self.drive.scheduler.add(wanted)
        except QueueFullError:
            assert waiting >= 6
        except RequestRejectedError:
            assert n > self.sequences or prompt + tokens - 1 > self.num_blocks * BLOCK_SIZE
        else:
            self.live[wanted.request_id] = wanted

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), index=st.none() | st.integers(0, 2))
    def abort(self, which: int, index: int | None) -> None:
        self._abort(list(self.live)[which % len(self.live)], index)

    @rule()
    def step(self) -> None:
        self._step()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def step_with_an_abort(self, which: int) -> None:
        self._step(list(self.live)[which % len(self.live)])

    @invariant()
    def numbers_agree(self) -> None:
        if hasattr(self, "drive"):
            stats = self.drive.scheduler.stats()
            assert stats.running <= self.sequences
            assert self.drive.scheduler.idle == (not self.live)
            assert self.live or stats.kv_usage == 0

    def teardown(self) -> None:
        if hasattr(self, "drive"):
            # The first in rank gets on in every step: so all end, and so soon.
            for _ in range(sum(r.n * (len(r.prompt_token_ids) + r.sampling.max_tokens) for r in self.live.values())):
                self._step()
            assert not self.live
            assert self.drive.pool.num_free == self.num_blocks
            for names in self.first_run.values():
                assert names == sorted(names, key=int), "first come, first admitted, within a priority"

    def _abort(self, name: str, index: int | None) -> None:
        ended = self.drive.scheduler.abort(name, index)
        assert len(set(ended)) == len(ended)
        for child in ended:
            assert self.drive.heard[name, child].reason is None
            self.drive.heard[name, child].chunks.append(TokenChunk((), FinishReason.ABORT))
        self._forget_if_over(name)

    def _step(self, abort: str | None = None) -> None:
        told = {name: len(heard.tokens) for name, heard in self.drive.heard.items() if not heard.reason}
        put_off = self.drive.scheduler.stats().preemptions
        step = self.drive.step(meanwhile=lambda: self._abort(abort, None) if abort else None)
        sizes = [len(slice_.token_ids) for slice_ in step.slices]
        assert sum(sizes) <= self.budget
        assert len(sizes) <= self.sequences
        served = {name for name, heard in self.drive.heard.items() if len(heard.tokens) > told.get(name, 0)}
        if put_off == self.drive.scheduler.stats().preemptions:
            assert {name for name in self.served & set(told) if name[0] != abort} <= served, "who decodes is served"
        self.served = served
        for sequence in step.sequences:
            name = sequence.request.request_id
            if name not in self.first_run[sequence.request.priority]:
                self.first_run[sequence.request.priority].append(name)
        for name in list(self.live):
            self._forget_if_over(name)

    def _forget_if_over(self, name: str) -> None:
        wanted = self.live.get(name)
        if wanted is None:
            return
        heard = [self.drive.heard[name, index] for index in range(wanted.n)]
        for child in heard:
            full = greedy_continuation(wanted.prompt_token_ids, wanted.sampling.max_tokens)
            assert child.tokens == full[: len(child.tokens)]
            assert child.reason is not FinishReason.LENGTH or child.tokens == full
        if all(child.reason for child in heard):
            del self.live[name]


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = settings(max_examples=50, stateful_step_count=30)


def test_a_long_prompt_is_cut_and_does_not_stop_the_others() -> None:
    drive = Drive(HistoryRunner(100), max_sequences=4, token_budget=10)
    drive.scheduler.add(request("short", prompt=3, max_tokens=20))
    assert lengths(drive.step()) == {"short": 3}
    drive.scheduler.add(request("long", prompt=25))
    drive.scheduler.add(request("next", prompt=3))
    assert [lengths(drive.step()) for _ in range(4)] == [
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 7, "next": 2},
        {"short": 1, "long": 1, "next": 1},
    ]


@pytest.mark.parametrize("cached", [0, 4])
def test_a_prompt_with_one_token_to_compute_does_not_overtake_older_prompts(cached: int) -> None:
    drive = Drive(HistoryRunner(100), max_sequences=3, token_budget=3)
    short = request("short", prompt=1 + cached, max_tokens=1)
    drive.scheduler.add(short)
    drive.finish()  # the prefix cache has all of the prompt from now on, but for its last token
    drive.scheduler.add(request("a", prompt=3, max_tokens=1))
    drive.scheduler.add(request("b", prompt=4, max_tokens=1))
    drive.scheduler.add(replace(short, request_id="again"))
    assert [lengths(drive.step()) for _ in range(3)] == [{"a": 3}, {"b": 3}, {"b": 1, "again": 1}]


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    drive = Drive(HistoryRunner(4))
    drive.scheduler.add(request("first", prompt=8, max_tokens=3))
    drive.scheduler.add(request("large", prompt=12, max_tokens=2))
    drive.scheduler.add(request("small", prompt=1, max_tokens=1))
    assert [lengths(drive.step()) for _ in range(4)] == [{"first": 8}, {"first": 1}, {"first": 1}, {"large": 12}]


def test_a_block_is_held_back_for_those_who_run() -> None:
    drive = Drive(HistoryRunner(4))
    drive.scheduler.add(request("a", prompt=4, max_tokens=9))
    drive.step()
    drive.scheduler.add(request("b", prompt=9, max_tokens=1))
    assert lengths(drive.step()) == {"a": 1}, "three blocks would fit, and leave none"
    drive.finish()
    assert drive.scheduler.stats().preemptions == 0


def test_better_priorities_come_first() -> None:
    drive = Drive(HistoryRunner(100), max_sequences=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -5), ("e", 0)):
        drive.scheduler.add(request(name, max_tokens=1, priority=priority))
    assert [list(lengths(drive.step())) for _ in range(5)] == [["d"], ["b"], ["e"], ["a"], ["c"]]


def test_the_last_in_rank_is_put_off_and_goes_on_later() -> None:
    drive = Drive(HistoryRunner(7), prefix_caching=False)
    requests = [request(name, prompt=4, max_tokens=13, priority=p) for name, p in (("a", 0), ("urgent", -1), ("b", 0))]
    for each in requests:
        drive.scheduler.add(each)
    assert lengths(drive.step()) == {"urgent": 4, "a": 4, "b": 4}
    drive.finish()
    # Four blocks each, of seven: b is put off, then a.
    assert drive.scheduler.stats().preemptions == 2
    assert list(drive.ended) == [("urgent", 0), ("a", 0), ("b", 0)]
    for each in requests:
        heard = drive.heard[each.request_id, 0]
        assert heard.tokens == greedy_continuation(each.prompt_token_ids, 13)
        assert [len(chunk.token_ids) for chunk in heard.chunks] == [1] * 13, "each token is told once"


def test_the_first_in_rank_is_never_put_off() -> None:
    """Of three that do not fit together, the urgent one gets a token in every step."""
    drive = Drive(HistoryRunner(9), max_sequences=8)
    for i in range(4):
        drive.scheduler.add(request(f"{i}", prompt=4, max_tokens=25))
    drive.step()
    drive.scheduler.add(request("urgent", prompt=4, max_tokens=25, priority=-1))
    while "urgent" not in lengths(drive.step()):
        pass
    for _ in range(24):
        assert "urgent" in lengths(drive.step())
    assert drive.heard["urgent", 0].reason is FinishReason.LENGTH
    assert drive.scheduler.stats().preemptions > 0


def test_what_was_put_off_finds_its_own_blocks_again() -> None:
    requests = [request("a", prompt=8, max_tokens=9), request("b", prompt=8, max_tokens=9)]
    recomputed = {}
    for caching in (False, True):
        drive = Drive(HistoryRunner(6), prefix_caching=caching)
        for each in requests:
            drive.scheduler.add(each)
        drive.finish()
        assert drive.scheduler.stats().preemptions > 0
        recomputed[caching] = sum(length for batch in drive.runner.batches for _, length, _ in batch)  # type: ignore[attr-defined]
    assert recomputed[True] < recomputed[False]


def test_the_last_token_needs_no_block() -> None:
    drive = Drive(HistoryRunner(2))
    exact = request("exact", prompt=7, max_tokens=2)
    drive.scheduler.add(exact)
    drive.step()
    drive.step()
    first, second = greedy_continuation(exact.prompt_token_ids, 2)
    assert drive.heard["exact", 0].chunks == [TokenChunk((first,)), TokenChunk((second,), FinishReason.LENGTH)]
    assert drive.pool.num_free == 2
    with pytest.raises(RequestRejectedError, match="KV cache of 8 positions"):
        drive.scheduler.add(request("too long", prompt=7, max_tokens=3))


def test_queue_limit() -> None:
    drive = Drive(HistoryRunner(100), max_sequences=1, max_waiting=2)
    drive.scheduler.add(request("a"))
    drive.scheduler.add(request("b"))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        drive.scheduler.add(request("c"))
    drive.step()
    drive.scheduler.add(request("c"))
    assert (drive.scheduler.stats().running, drive.scheduler.stats().waiting) == (1, 2)


def test_an_id_may_be_used_again_while_the_old_step_is_under_way() -> None:
    drive = Drive(HistoryRunner(100))
    drive.scheduler.add(request("a"))

    def replace_it() -> None:
        assert drive.scheduler.abort("a") == [0]
        drive.scheduler.add(request("a", prompt=5))

    drive.step(meanwhile=replace_it)
    assert not drive.heard
    assert lengths(drive.step()) == {"a": 5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_sequences": 0},
        {"max_waiting": 0},
        {"token_budget": 31},
        {"logit_rows": 31},
        {"step_timeout_s": 0},
        {"step_timeout_s": math.nan},
    ],
)
def test_limits_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SchedulerLimits(**wrong)  # type: ignore[arg-type]
