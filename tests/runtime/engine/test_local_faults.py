"""LocalEngine when something fails, hangs, or is to end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence

import pytest
from history_runner import HistoryRunner
from local_clients import CountingRunner, collect, eventually, idle, request, running

from runtime.engine.base import (
    CorruptLogitsError,
    DrainingError,
    EngineDeadError,
    FinishReason,
    GenerationError,
    GenerationRequest,
    SamplingParams,
    TokenChunk,
)
from runtime.engine.local import LocalEngine
from runtime.engine.runner import SequenceSlice
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
            with pytest.raises(CorruptLogitsError, match=r"request 'bad' failed: .* nan"):
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
            for i in range(6):
                await engine.abort(f"{i}")  # as whoever has not heard of it may do
            engine.stats()

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


@pytest.mark.parametrize("where", ["step", "copy_blocks"])
def test_a_step_that_hangs_is_seen_and_does_not_hang_the_shutdown(where: str, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    async def main() -> None:
        runner = HistoryRunner(64)
        work = getattr(runner, where)
        setattr(runner, where, lambda *arguments: (release.wait(20), work(*arguments))[1])
        engine = LocalEngine(runner, SchedulerLimits(step_timeout_s=0.2))
        await engine.check_health()
        wanted = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=5), n=2)
        client = asyncio.create_task(collect(engine, wanted))
        await asyncio.sleep(0.1)
        await engine.check_health()
        await asyncio.sleep(0.3)
        reason = r"no step has ended for 0\.\d s, more than step_timeout_s of 0\.2 s"
        with pytest.raises(EngineDeadError, match=reason):
            await engine.check_health()
        with pytest.raises(EngineDeadError, match=reason):
            await client
        with pytest.raises(EngineDeadError, match=reason):
            await collect(engine, request("late"))
        async with asyncio.timeout(10):
            await engine.shutdown(0)
        assert "hangs; its thread is left behind" in caplog.text
        with pytest.raises(EngineDeadError, match="its last step hangs"):
            await engine.check_health()
        release.set()
        await eventually(lambda: not any(t.name.startswith("osp-engine") for t in threading.enumerate()))

    asyncio.run(main())


def test_a_step_that_ends_after_all_makes_the_engine_healthy_again() -> None:
    release = threading.Event()

    async def main() -> None:
        async with running(CountingRunner(lambda batch: release.wait(20) and None), step_timeout_s=0.1) as engine:
            client = asyncio.create_task(collect(engine, request("a")))
            await asyncio.sleep(0.2)
            with pytest.raises(EngineDeadError):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await client
            with pytest.raises(EngineDeadError):
                await engine.check_health()  # nobody waits any more, but the step still hangs
            release.set()
            await eventually(lambda: idle(engine))
            async with asyncio.timeout(10):
                while True:
                    with contextlib.suppress(EngineDeadError):
                        await engine.check_health()
                        break
                    await asyncio.sleep(0.01)
            assert (await collect(engine, request("b")))[0] == [4, 5, 6, 7, 8]

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_a_word_is_seen() -> None:
    def leave(batch: object) -> None:
        raise SystemExit

    async def main() -> None:
        engine = LocalEngine(CountingRunner(leave))
        client = asyncio.create_task(collect(engine, request("a")))
        await eventually(lambda: not any(t.name.startswith("osp-engine") for t in threading.enumerate()))
        with pytest.raises(EngineDeadError, match="thread has ended"):
            await engine.check_health()
        with pytest.raises(EngineDeadError, match="thread has ended"):
            await client
        await engine.shutdown(0)

    asyncio.run(main())


def test_the_first_chunk_of_each_sequence_says_how_long_it_was_queued() -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.05)), max_sequences=2) as engine:
            first = GenerationRequest("first", (1, 2), SamplingParams(max_tokens=3), n=2)

            async def chunks_of(wanted: GenerationRequest) -> list[TokenChunk]:
                return [chunk async for chunk in engine.generate(wanted)]

            chunks = await asyncio.gather(chunks_of(first), chunks_of(request("second", max_tokens=1)))
            heard = {(i, chunk.index): chunk.queued_s for i in (0, 1) for chunk in reversed(chunks[i])}
            assert 0 <= heard[0, 0] == heard[0, 1] < 0.04
            assert heard[1, 0] >= 0.09  # there is no room before the first request's third step
            assert sum(chunk.queued_s > 0 for chunk in chunks[0]) == 2

    asyncio.run(main())


def test_an_observer_hears_of_each_step() -> None:
    async def main() -> None:
        heard: list[tuple[float, int]] = []
        async with running(CountingRunner(lambda batch: time.sleep(0.02))) as engine:
            engine.observe_steps(lambda seconds, tokens: heard.append((seconds, tokens)))
            await collect(engine, request("a", prompt=(1, 2, 3), max_tokens=4))
        assert [tokens for _, tokens in heard] == [3, 1, 1, 1]
        assert all(0.02 <= seconds < 1 for seconds, _ in heard)

    asyncio.run(main())


def test_steps_that_take_long_together_are_healthy() -> None:
    async def main() -> None:
        async with running(CountingRunner(lambda batch: time.sleep(0.02)), step_timeout_s=0.3) as engine:
            client = asyncio.create_task(collect(engine, request("a", max_tokens=30)))
            while not client.done():
                await engine.check_health()
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.4)
            await engine.check_health()  # idle for longer than a step may take

    asyncio.run(main())


def test_a_guide_that_fails_fails_its_own_request_only() -> None:
    class Broken:
        def allowed(self, token_ids: object) -> None:
            raise LookupError("no such state")

    async def main() -> None:
        async with running(CountingRunner()) as engine:
            good = asyncio.create_task(collect(engine, request("good", max_tokens=50)))
            with pytest.raises(
                GenerationError, match="request 'bad' failed: the guide failed with LookupError: no such"
            ):
                await collect(engine, request("bad", guide=Broken()))  # type: ignore[arg-type]
            assert len((await good)[0]) == 50
            await engine.check_health()

    asyncio.run(main())
