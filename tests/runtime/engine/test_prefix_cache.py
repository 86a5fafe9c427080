"""Common prefixes are computed once: by whom they are found, how far, and when they are forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drive import Drive, run
from history_runner import HistoryRunner, greedy_continuation
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.prefix_keys import PrefixKeys

GREEDY = SamplingParams(max_tokens=3, temperature=0)
PROMPT = tuple(range(10))  # two blocks of four, and a half


def request(name: str, prompt: tuple[int, ...] = PROMPT, **changes: object) -> GenerationRequest:
    return GenerationRequest(name, prompt, replace(GREEDY, **changes))  # type: ignore[arg-type]


def one_after_another(*requests: GenerationRequest, num_blocks: int = 64, **limits: float) -> tuple[Drive, list[int]]:
    """How many prompt tokens the cache had for each."""
    drive = Drive(HistoryRunner(num_blocks), **limits)
    for each in requests:
        drive.scheduler.add(each)
        drive.finish()
    return drive, [drive.heard[each.request_id, 0].chunks[0].cached_tokens for each in requests]


@pytest.mark.parametrize(
    ("second", "cached"),
    [
        (PROMPT, 8),
        (PROMPT[:9], 8),
        (PROMPT[:8], 4),  # its last token must be computed, or there are no logits
        (PROMPT[:5], 4),
        (PROMPT[:4], 0),
        ((*PROMPT[:7], 31), 4),
        ((31, *PROMPT[1:]), 0),
        (PROMPT + (1,) * 9, 8),
        # Generated tokens are remembered as well. The last one was never computed.
        ((*PROMPT, *greedy_continuation(PROMPT, 3)), 12),
        ((*PROMPT, *greedy_continuation(PROMPT, 1), 31, 31), 8),
    ],
)
def test_whole_blocks_of_the_prefix_are_found(second: tuple[int, ...], cached: int) -> None:
    drive, found = one_after_another(request("first"), request("second", second))
    assert found == [0, cached]
    assert drive.runner.batches[3][0][:2] == (cached, len(second) - cached)  # type: ignore[attr-defined]
    assert drive.heard["second", 0].tokens == greedy_continuation(second, 3)
    stats = drive.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (10 + len(second), cached)
    assert stats.kv_usage == 0


def test_salts_keep_tenants_apart() -> None:
    salts = [None, "a", "b", "a", None, "", "\ud800"]
    requests = [replace(request(f"{i}"), cache_salt=salt) for i, salt in enumerate(salts)]
    assert one_after_another(*requests)[1] == [0, 0, 0, 8, 8, 0, 0]


def test_prompt_logprobs_need_the_logits_that_the_cache_has_not() -> None:
    drive, found = one_after_another(request("a"), request("b", prompt_logprobs=1), request("c"))
    assert found == [0, 0, 8]
    assert drive.scheduler.stats().prefix_cache_queries == 20


def test_without_caching_nothing_is_looked_up() -> None:
    drive, found = one_after_another(request("a"), request("b"), prefix_caching=False)
    assert found == [0, 0]
    assert drive.scheduler.stats().prefix_cache_queries == 0


def test_running_requests_share_blocks() -> None:
    drive = Drive(HistoryRunner(64))
    drive.scheduler.add(request("a", max_tokens=20))
    drive.step()
    before = drive.pool.num_free
    drive.scheduler.add(request("b", max_tokens=20))
    drive.step()
    assert before - drive.pool.num_free == 1, "only the half block is b's own"
    drive.finish()
    assert drive.heard["a", 0].tokens == drive.heard["b", 0].tokens == greedy_continuation(PROMPT, 20)


def test_the_end_of_the_longest_unused_prefix_is_forgotten_first() -> None:
    old, new = tuple(range(12)), tuple(range(12, 24))
    # Each leaves three blocks behind. The third request takes the two blank blocks and two that are remembered.
    wanted = [
        request("old", old, max_tokens=1),
        request("new", new, max_tokens=1),
        request("x", (31,) * 13, max_tokens=1),
    ]
    again = [request("new again", new, max_tokens=1), request("old again", old, max_tokens=1)]
    _, found = one_after_another(*wanted, *again, num_blocks=8)
    assert found[:4] == [0, 0, 0, 8]
    assert found[4] == 4


@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.lists(st.integers(0, 3), min_size=4, max_size=12))
def test_keys_are_equal_exactly_where_all_tokens_before_are(a: list[int], b: list[int]) -> None:
    first, second = PrefixKeys(a, 2, None), PrefixKeys(b, 2, None)
    for i in range(len(a) // 2):
        for j in range(len(b) // 2):
            assert (first[i] == second[j]) == (a[: 2 * i + 2] == b[: 2 * j + 2])


def test_keys_follow_tokens_that_are_added() -> None:
    tokens = [1, 2]
    keys = PrefixKeys(tokens, 2, "salt")
    first = keys[0]
    tokens += [3, 4]
    fork = keys.fork([1, 2, 3, 5])
    assert keys[0] == fork[0] == first
    assert keys[1] == PrefixKeys([1, 2, 3, 4], 2, "salt")[1]
    assert fork[1] == PrefixKeys([1, 2, 3, 5], 2, "salt")[1] != keys[1]


def test_a_hit_gives_the_tokens_of_a_miss() -> None:
    prompts = [PROMPT, PROMPT, (*PROMPT, 4), PROMPT[:6]]
    requests = [request(f"{i}", prompt, max_tokens=30) for i, prompt in enumerate(prompts)]
    drive, found = one_after_another(*requests)
    assert sum(found) > 16
    assert [drive.heard[f"{i}", 0].tokens for i in range(4)] == [greedy_continuation(p, 30) for p in prompts]
    assert run(requests, HistoryRunner(64)) == {name: heard.tokens for name, heard in drive.heard.items()}
