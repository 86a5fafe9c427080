"""Clients of a LocalEngine who abort, leave, or are gone."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from local_clients import CountingRunner, collect, eventually, idle, request, running

from runtime.engine.base import FinishReason, GenerationRequest, SamplingParams
from runtime.engine.local import LocalEngine


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


def test_one_of_several_sequences_is_aborted() -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.002))) as engine:
            wanted = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=20, temperature=0), n=3)
            ends: list[tuple[int, FinishReason]] = []
            tokens = [0, 0, 0]
            async for chunk in engine.generate(wanted):
                tokens[chunk.index] += len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    ends.append((chunk.index, chunk.finish_reason))
                if sum(tokens) == 9:
                    await engine.abort("a", 1)
                    await engine.abort("a", 1)
                    await engine.abort("a", 3)
            assert ends == [(1, FinishReason.ABORT), (0, FinishReason.LENGTH), (2, FinishReason.LENGTH)]
            assert tokens[1] < tokens[0] == tokens[2] == 20
            assert idle(engine)

    asyncio.run(main())


def test_abort_of_all_sequences_tells_each() -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.002))) as engine:
            wanted = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=100), n=3)
            ended = set()
            async for chunk in engine.generate(wanted):
                await engine.abort("a")
                if chunk.finish_reason is not None:
                    assert chunk.finish_reason is FinishReason.ABORT
                    ended.add(chunk.index)
            assert ended == {0, 1, 2}
            assert idle(engine)

    asyncio.run(main())
