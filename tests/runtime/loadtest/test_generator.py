"""Client and generator against a server that keeps time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest
from fake_server import FakeServer

from runtime.loadtest.arrivals import arrival_times
from runtime.loadtest.endpoint import Endpoint, EndpointError
from runtime.loadtest.figures import Figures, ServiceLevel, figures, samples
from runtime.loadtest.generator import Load, LoadGenerator
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.workload import Conversation, Turn, Workload

TOLERANCE_MS = 2.0


def alone(count: int, tokens: int = 4) -> list[Conversation]:
    return [(Turn((1, 2, 3), tokens, ignore_eos=True),)] * count


async def loaded(
    server: FakeServer,
    conversations: Sequence[Conversation],
    rate: float | None = None,
    max_concurrency: int | None = None,
    *,
    prefix_cache: bool = False,
    timeout_s: float = 30.0,
) -> Load:
    load = Load()
    async with server.running(), open_session({}, timeout_s) as session:
        endpoint = Endpoint(server.url, "fake", server.owner)
        generator = LoadGenerator(session, endpoint, prefix_cache=prefix_cache, progress=lambda: None)
        count = len(conversations)
        due_N = np.zeros(count) if rate is None else arrival_times(count, rate, 1.0, seed=0)
        await generator.run(load, conversations, due_N, max_concurrency, closed_loop=rate is None)
    return load


def figures_of(load: Load) -> Figures:
    return figures(load.records, load.duration_s, ServiceLevel())


@pytest.mark.parametrize("first_ms", [20, 60])
def test_known_delays_give_known_figures(first_ms: float) -> None:
    server = FakeServer(first_s=first_ms / 1000, gap_s=0.015, tokens=11)
    load = asyncio.run(loaded(server, alone(30, 11), rate=30.0))

    # A busy neighbour delays some requests, and cannot make any of them early.
    found, latencies = figures_of(load), samples(load.records)
    for name, value in (("ttft_ms", first_ms), ("e2el_ms", first_ms + 150)):
        assert min(latencies[name]) >= value
        assert np.percentile(latencies[name], 10) == pytest.approx(value, abs=TOLERANCE_MS)
    assert found["median_tpot_ms"] == pytest.approx(15, abs=TOLERANCE_MS)
    assert found["median_itl_ms"] == pytest.approx(15, abs=TOLERANCE_MS)
    seen = sorted(load.records, key=lambda record: record.sent_s)
    late_s = [record.first_s - written for record, written in zip(seen, server.first_written_s, strict=True)]
    assert 0 <= 1000 * np.median(late_s) <= TOLERANCE_MS
    assert found["completed"] == 30
    assert found["total_output_tokens"] == 330
    # The last request is due after a second.
    assert found["duration"] == pytest.approx(1.15 + first_ms / 1000, abs=0.05)


def test_a_server_that_stalls_for_three_seconds_shows_in_p99() -> None:
    now = time.perf_counter()
    server = FakeServer(first_s=0.005, tokens=1, stalls=(now + 0.5, now + 3.5))

    load = asyncio.run(loaded(server, alone(100, 1), rate=30.0, max_concurrency=2))

    # Two are stuck, and the others wait for them: a client that counts from when it sends would see two slow requests
    # in a hundred. Nearly all that were due in the stall have waited for its end.
    found = figures_of(load)
    assert found["p99_ttft_ms"] > 2800
    slow = [record for record in load.records if record.ttft_s > 0.1]
    assert len(slow) > 60
    assert sum(record.last_s - record.sent_s > 0.1 for record in load.records) <= 4


def test_a_closed_loop_keeps_so_many_under_way_and_counts_from_each_turn() -> None:
    server = FakeServer(first_s=0.02, gap_s=0.01, tokens=4)

    found = figures_of(asyncio.run(loaded(server, alone(12), max_concurrency=3)))

    assert server.most_at_once == 3
    # From the start, the last ones would have waited 150 ms for their turn.
    assert 50 <= found["median_e2el_ms"] < 70
    assert found["p99_e2el_ms"] < 120
    assert 0.2 <= found["duration"] < 0.4


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ("closed", "closed the connection in the middle of its answer, after 2 pieces"),
        ("error", "ended the stream with an error: the engine has died"),
        ("no done", "without \\[DONE\\]"),
    ],
)
def test_an_answer_that_goes_wrong_is_a_failure_with_a_reason(ends: str, words: str) -> None:
    load = asyncio.run(loaded(FakeServer(ends=ends), alone(3), max_concurrency=1))

    assert figures_of(load)["failed"] == 3
    for error in load.errors:
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(error)


def test_a_request_that_takes_too_long_is_a_failure() -> None:
    load = asyncio.run(loaded(FakeServer(first_s=5.0), alone(1), max_concurrency=1, timeout_s=0.2))

    assert load.errors == ["no whole answer within the time limit (--request-timeout)"]


def test_a_turn_begins_with_all_that_was_said_before() -> None:
    server = FakeServer(tokens=2)
    turns = tuple(Turn(prompt, 2, ignore_eos=True) for prompt in ((7, 8), (9,), (5, 5)))

    load = asyncio.run(loaded(server, [turns], max_concurrency=1))

    # The server's tokens are always 0 and 1.
    assert [body["prompt"] for body in server.bodies] == [[7, 8], [7, 8, 0, 1, 9], [7, 8, 0, 1, 9, 0, 1, 5, 5]]
    assert len(load.records) == 3


def test_turns_need_a_server_that_tells_token_ids() -> None:
    turns = (Turn((1,), 2, ignore_eos=True),) * 2

    with pytest.raises(EndpointError, match="token ids"):
        asyncio.run(loaded(FakeServer(owner="someone"), [turns], max_concurrency=1))


def test_no_two_requests_share_a_cache_unless_they_may() -> None:
    apart, together, llama = FakeServer(), FakeServer(), FakeServer(owner="llamacpp")

    asyncio.run(loaded(apart, alone(3), max_concurrency=1))
    asyncio.run(loaded(together, alone(3), max_concurrency=1, prefix_cache=True))
    asyncio.run(loaded(llama, alone(3), max_concurrency=1))

    assert len({body["cache_salt"] for body in apart.bodies}) == 3
    assert not any("cache_salt" in body for body in together.bodies)
    assert all(body["cache_prompt"] is False for body in llama.bodies)


def test_the_generator_notices_that_it_is_late() -> None:
    async def beside_a_busy_loop() -> Load:
        async def hog() -> None:
            for _ in range(10):
                time.sleep(0.05)  # what no coroutine should do
                await asyncio.sleep(0.001)

        busy = asyncio.create_task(hog())
        load = await loaded(FakeServer(first_s=0.4), alone(2), max_concurrency=2)
        await busy
        return load

    assert asyncio.run(beside_a_busy_loop()).loop_lag_p99_ms > 20


@pytest.mark.parametrize(
    ("server", "key", "words"),
    [
        (FakeServer(key="right"), "wrong", r"refuses the key \(HTTP 401: no such key\); set OPENAI_API_KEY"),
        (FakeServer(ends="closed"), None, "does not complete a prompt of token ids"),
        (FakeServer(), None, "does not serve other; it serves fake"),
    ],
    ids=["wrong key", "closes", "unknown model"],
)
def test_what_is_wrong_with_a_server_is_said_before_the_load(server: FakeServer, key: str | None, words: str) -> None:
    async def connect() -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with server.running(), open_session(headers, 5) as session:
            server.tokens = 4
            model = "other" if words.startswith("does not serve") else None
            await find_endpoint(session, server.url, model, headers, {"max_tokens": 4})

    with pytest.raises(EndpointError, match=words):
        asyncio.run(connect())


def test_a_right_key_opens() -> None:
    async def connect() -> Endpoint:
        server, headers = FakeServer(key="right"), {"Authorization": "Bearer right"}
        async with server.running(), open_session(headers, 5) as session:
            return await find_endpoint(session, server.url.removesuffix("/v1"), None, headers, {})

    assert asyncio.run(connect()).model == "fake"


def test_prompts_are_alike_for_both_sides_and_new_in_each_repeat() -> None:
    workload = Workload(num_prompts=5, input_len=7, output_len=3)

    assert workload.conversations(50, 0) == workload.conversations(50, 0)
    assert not set(workload.conversations(50, 0)) & set(workload.conversations(50, 1))
    for (turn,) in workload.conversations(50, 0):
        assert len(turn.prompt) == 7
        assert all(0 <= int(token) < 50 for token in turn.prompt)


def test_shared_prefixes_are_shared_by_all_repeats() -> None:
    workload = Workload(kind="shared-prefix", num_prompts=4, input_len=3, prefix_len=6)

    prompts = [turn.prompt for repeat in (0, 1) for (turn,) in workload.conversations(500, repeat)]

    assert len({prompt[:6] for prompt in prompts}) == 1
    assert len({prompt[6:] for prompt in prompts}) == 8
