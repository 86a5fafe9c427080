"""LocalEngine under concurrency, aborts, faults and shutdown; and greedy text against transformers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from quant.format import Checkpoint
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    EngineInfo,
    FinishReason,
    GenerationError,
    GenerationRequest,
    ModelRunner,
    QueueFullError,
    RequestRejectedError,
    SamplingParams,
    SequenceSlice,
    TokenChunk,
)
from runtime.engine.local import LocalEngine
from runtime.engine.reference import ReferenceRunner
from runtime.engine.scheduler import SchedulerLimits

VOCABULARY = 50


class CountingRunner:
    """The token after t is t + 1. `before_step` may wait, raise, or return the row of logits to spoil with NaN."""

    block_size, num_blocks = 4, 64
    info = EngineInfo("counting", "float32", 200, VOCABULARY)

    def __init__(self, before_step: Callable[[Sequence[SequenceSlice]], int | None] = lambda batch: None) -> None:
        self.before_step = before_step
        self.steps = 0

    def step(self, batch: Sequence[SequenceSlice]) -> ArrayLogits:
        self.steps += 1
        spoilt = self.before_step(batch)
        last = [slice_.token_ids[-1] for slice_ in batch if slice_.num_logits]
        logits = np.zeros((len(last), VOCABULARY), np.float32)
        logits[np.arange(len(last)), [(token + 1) % VOCABULARY for token in last]] = 100
        if spoilt is not None:
            logits[spoilt] = np.nan
        return ArrayLogits(logits)


def request(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 5, **sampling: float) -> GenerationRequest:
    settings = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(name, tuple(prompt), settings)


async def collect(engine: LocalEngine, wanted: GenerationRequest) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        reason = chunk.finish_reason
    return tokens, reason


@asynccontextmanager
async def running(runner: ModelRunner, **limits: int) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(runner, SchedulerLimits(**limits))
    try:
        yield engine
    finally:
        await engine.shutdown(0)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def idle(engine: LocalEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("osp", "asyncio"))]


def test_tokens_arrive_one_by_one_and_end() -> None:
    async def main() -> None:
        async with running(CountingRunner()) as engine:
            chunks = [chunk async for chunk in engine.generate(request("a", max_tokens=3))]
            assert chunks == [TokenChunk((4,)), TokenChunk((5,)), TokenChunk((6,), FinishReason.LENGTH)]
            stop = GenerationRequest("b", (1,), SamplingParams(max_tokens=50, stop_token_ids=frozenset({4})))
            assert await collect(engine, stop) == ([2, 3, 4], FinishReason.STOP)
            assert idle(engine)

    asyncio.run(main())


def test_greedy_equals_transformers(full_precision: Checkpoint) -> None:
    prompts = [[5, 17, 3], [88], list(range(30)), [1, 1, 1, 2]]
    model = LlamaForCausalLM.from_pretrained(full_precision.path, dtype=torch.float32)
    expected = []
    for ids in prompts:
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(output[0, len(ids) :].tolist())

    async def main() -> None:
        async with running(ReferenceRunner(full_precision)) as engine:
            wanted = [request(f"{i}", ids, 30, temperature=0) for i, ids in enumerate(prompts)]
            found = await asyncio.gather(*(collect(engine, each) for each in wanted))
            assert [tokens for tokens, _ in found] == expected

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{}, {"max_sequences": 3, "token_budget": 5}])
def test_twenty_at_once_equal_one_by_one(quantized: Checkpoint, limits: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    wanted = [
        request(f"{i}", rng.integers(0, 97, rng.integers(1, 40)).tolist(), 20, seed=i, top_p=0.9, temperature=0.8)
        for i in range(20)
    ]

    async def main() -> None:
        async with running(ReferenceRunner(quantized)) as engine:
            alone = [await collect(engine, each) for each in wanted]
        async with running(ReferenceRunner(quantized, num_blocks=20, block_size=8), **limits) as engine:
            together = await asyncio.gather(*(collect(engine, each) for each in wanted))
            assert idle(engine)
        assert together == alone
        assert len({tuple(tokens) for tokens, _ in alone}) == 20

    asyncio.run(main())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("x", ()), "empty"),
        (request("x", (1, VOCABULARY)), "token id 50, which is outside"),
        (request("x", (-1,)), "token id -1, which is outside"),
        (request("x", max_tokens=0), "max_tokens must be at least 1"),
        (request("x", max_tokens=198), "exceed the context of 200"),
        (request("x", temperature=-1), "temperature"),
        (request("x", temperature=float("nan")), "temperature"),
        (request("x", temperature=float("inf")), "temperature"),
        (request("x", top_p=0), "top_p"),
        (request("x", top_p=1.01), "top_p"),
        (request("live"), "'live' is running already"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_and_harms_nobody(wrong: GenerationRequest, message: str) -> None:
    async def main() -> None:
        async with running(CountingRunner()) as engine:
            live = engine.generate(request("live", max_tokens=100))
            await anext(live)
            with pytest.raises(RequestRejectedError, match=message):
                await anext(engine.generate(wrong))
            assert len([chunk async for chunk in live]) == 99
            await engine.check_health()

    asyncio.run(main())


def test_a_request_larger_than_the_cache_is_refused() -> None:
    async def main() -> None:
        runner = CountingRunner()
        runner.num_blocks = 10
        async with running(runner) as engine:
            with pytest.raises(RequestRejectedError, match="KV cache of 40 positions"):
                await collect(engine, request("x", max_tokens=100))

    asyncio.run(main())


def test_abort_ends_a_stream_at_once_and_frees_its_blocks() -> None:
    async def main() -> None:
        steps = threading.Semaphore(3)
        runner = CountingRunner(lambda batch: steps.acquire(timeout=5) and None)
        async with running(runner) as engine:
            stream = engine.generate(request("a", max_tokens=150))
            await anext(stream)
            await eventually(lambda: runner.steps == 4)  # the worker now stands in a step
            await engine.abort("a")
            assert idle(engine)
            reasons = [chunk.finish_reason async for chunk in stream]
            assert reasons == [None, None, FinishReason.ABORT]
            steps.release(50)
            assert await collect(engine, request("a")) == ([4, 5, 6, 7, 8], FinishReason.LENGTH)
            await engine.abort("nobody")

    asyncio.run(main())


def test_abort_of_a_waiting_request() -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.001)), max_sequences=1) as engine:
            first = asyncio.create_task(collect(engine, request("first", max_tokens=30)))
            second = asyncio.create_task(collect(engine, request("second")))
            await eventually(lambda: engine.stats().waiting == 1 and engine.stats().running == 1)
            await engine.abort("second")
            assert await second == ([], FinishReason.ABORT)
            assert len((await first)[0]) == 30

    asyncio.run(main())


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_client_that_goes_away_frees_its_blocks(way: str) -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.002))) as engine:
            if way == "close":
                stream = engine.generate(request("a", max_tokens=150))
                await anext(stream)
                await stream.aclose()
            else:
                task = asyncio.create_task(collect(engine, request("a", max_tokens=150)))
                await eventually(lambda: engine.stats().running == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert idle(engine)

    asyncio.run(main())


def test_closing_a_finished_stream_late_leaves_the_ids_next_owner_alone() -> None:
    async def main() -> None:
        async with running(CountingRunner()) as engine:
            old = engine.generate(request("a", max_tokens=1))
            assert (await anext(old)).finish_reason is FinishReason.LENGTH
            new = engine.generate(request("a", max_tokens=100))
            await anext(new)
            await old.aclose()
            assert len([chunk async for chunk in new]) == 99

    asyncio.run(main())


def test_a_client_whose_event_loop_is_gone_is_dropped() -> None:
    engine = LocalEngine(CountingRunner(lambda batch: time.sleep(0.002)))
    loop = asyncio.new_event_loop()
    stream = engine.generate(request("a", max_tokens=150))
    loop.run_until_complete(anext(stream))
    loop.close()

    async def main() -> None:
        await eventually(lambda: idle(engine))
        assert len((await collect(engine, request("b")))[0]) == 5
        await engine.shutdown(0)

    asyncio.run(main())
    del stream


def test_nan_logits_fail_their_own_request_only() -> None:
    async def main() -> None:
        def spoil(batch: Sequence[SequenceSlice]) -> int | None:
            time.sleep(0.001)
            # "bad" has the second row; its prompt of 3 and its first tokens pass.
            return 1 if len(batch) == 2 and batch[1].start > 5 else None

        async with running(CountingRunner(spoil)) as engine:
            good = engine.generate(request("good", max_tokens=100))
            await anext(good)
            with pytest.raises(GenerationError, match=r"request 'bad' failed: .* nan"):
                await collect(engine, request("bad", max_tokens=90))
            assert len([chunk async for chunk in good]) == 99
            await engine.check_health()
            assert idle(engine)

    asyncio.run(main())


def test_a_runner_that_raises_kills_the_engine_and_wakes_everybody() -> None:
    async def main() -> None:
        def fail(batch: Sequence[SequenceSlice]) -> None:
            if runner.steps > 20:
                raise MemoryError("no room for logits")

        runner = CountingRunner(fail)
        async with running(runner, max_sequences=2) as engine:
            await engine.check_health()
            clients = (collect(engine, request(f"{i}", max_tokens=100)) for i in range(6))
            for outcome in await asyncio.gather(*clients, return_exceptions=True):
                assert isinstance(outcome, EngineDeadError)
                assert "MemoryError: no room for logits" in str(outcome)
            with pytest.raises(EngineDeadError, match="no room for logits"):
                await engine.check_health()
            with pytest.raises(EngineDeadError, match="no room for logits"):
                await anext(engine.generate(request("late")))

    asyncio.run(main())


def test_shutdown_lets_live_requests_finish_and_takes_no_new_ones() -> None:
    async def main() -> None:
        engine = LocalEngine(CountingRunner(lambda batch: time.sleep(0.002)), SchedulerLimits(max_sequences=1))
        live = [asyncio.create_task(collect(engine, request(f"{i}", max_tokens=20))) for i in range(3)]
        await eventually(lambda: engine.stats().waiting == 2)
        shutdown = asyncio.create_task(engine.shutdown(drain_s=30))
        await asyncio.sleep(0.01)
        with pytest.raises(DrainingError, match="draining"):
            await anext(engine.generate(request("late")))
        assert [(len(tokens), reason) for tokens, reason in await asyncio.gather(*live)] == [
            (20, FinishReason.LENGTH)
        ] * 3
        await shutdown
        with pytest.raises(EngineDeadError, match="shut down"):
            await engine.check_health()
        await engine.shutdown(drain_s=30)  # nothing left to do

    asyncio.run(main())


def test_shutdown_aborts_what_the_drain_leaves() -> None:
    async def main() -> None:
        # Undisturbed it would take ten seconds, or longer on a busy machine.
        engine = LocalEngine(CountingRunner(lambda batch: time.sleep(0.05)))
        live = asyncio.create_task(collect(engine, request("a", max_tokens=190)))
        await eventually(lambda: engine.stats().running == 1)
        start = time.monotonic()
        await engine.shutdown(drain_s=0.2)
        assert time.monotonic() - start >= 0.2
        tokens, reason = await live
        assert reason is FinishReason.ABORT
        assert len(tokens) < 190
        assert idle(engine)

    asyncio.run(main())


def test_shutdown_waits_for_no_other_work_of_the_process() -> None:
    async def main() -> None:
        engine = LocalEngine(CountingRunner())
        release = threading.Event()
        others = [asyncio.create_task(asyncio.to_thread(release.wait)) for _ in range(100)]  # more than asyncio has
        try:
            await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                await engine.shutdown(drain_s=0)
        finally:
            release.set()
        await asyncio.gather(*others)

    asyncio.run(main())


def test_a_full_queue_refuses_until_there_is_room() -> None:
    async def main() -> None:
        limits = {"max_sequences": 1, "max_waiting": 2}
        async with running(CountingRunner(lambda batch: time.sleep(0.002)), **limits) as engine:
            first = asyncio.create_task(collect(engine, request("first", max_tokens=20)))
            await eventually(lambda: engine.stats().running == 1)
            waiting = [asyncio.create_task(collect(engine, request(f"{i}"))) for i in range(2)]
            await eventually(lambda: engine.stats().waiting == 2)
            with pytest.raises(QueueFullError):
                await anext(engine.generate(request("x")))
            await asyncio.gather(first, *waiting)
            assert len((await collect(engine, request("x")))[0]) == 5

    asyncio.run(main())


def test_an_idle_engine_computes_nothing() -> None:
    async def main() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            await collect(engine, request("a", max_tokens=3))
            spent = time.process_time()
            await asyncio.sleep(0.2)
            assert runner.steps == 3
            assert time.process_time() - spent < 0.1

    asyncio.run(main())
