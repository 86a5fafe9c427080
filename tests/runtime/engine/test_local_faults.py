"""LocalEngine when something fails, hangs, or is to end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from local_clients import CountingRunner, collect, eventually, idle, request, running

from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    FinishReason,
    GenerationError,
    SequenceSlice,
)
from runtime.engine.local import LocalEngine
from runtime.engine.scheduler import SchedulerLimits


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
