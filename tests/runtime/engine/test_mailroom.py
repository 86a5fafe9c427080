"""What clients get of the events that an engine's thread sends: when, in which order, and how much at once."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from runtime.engine.base import FinishReason, GenerationError, TokenChunk, TokenLogprobs
from runtime.engine.stream import Event, Mailroom, Stream

NEVER_S = 60.0
"""An interval that no test waits for."""

SOON_S = 0.001


def opened(interval_s: float, sequences: int = 1) -> tuple[Mailroom, Stream]:
    mailroom = Mailroom(interval_s)
    return mailroom, mailroom.open("a", sequences)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def token(token_id: int, index: int = 0, reason: FinishReason | None = None) -> TokenChunk:
    return TokenChunk((token_id,), reason, index)


async def all_of(stream: Stream, until: Callable[[Event], bool]) -> list[Event]:
    events = [await stream.next()]
    while not until(events[-1]):
        events.append(await stream.next())
    return events


def is_last(event: Event) -> bool:
    return isinstance(event, Exception) or event.finish_reason is not None


def test_without_an_interval_each_token_comes_at_once() -> None:
    async def test() -> None:
        mailroom, stream = opened(0)
        for token_id in range(5):
            mailroom.send([(stream, token(token_id))])
            assert await asyncio.wait_for(stream.next(), 1) == token(token_id)

    run(test)


def test_the_first_token_and_the_last_do_not_wait_for_the_interval() -> None:
    async def test() -> None:
        mailroom, stream = opened(NEVER_S)
        mailroom.send([(stream, token(1))])
        assert await asyncio.wait_for(stream.next(), 1) == token(1)
        mailroom.send([(stream, token(2))])
        mailroom.send([(stream, token(3))])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.next(), 0.1)
        mailroom.send([(stream, token(4, reason=FinishReason.STOP))])
        assert await asyncio.wait_for(stream.next(), 1) == TokenChunk((2, 3, 4), FinishReason.STOP)

    run(test)


def test_another_requests_first_token_does_not_wait_either() -> None:
    async def test() -> None:
        mailroom, old = opened(NEVER_S)
        new = mailroom.open("new", 1)
        mailroom.send([(old, token(1))])
        await old.next()
        mailroom.send([(old, token(2)), (new, token(7))])
        assert await asyncio.wait_for(new.next(), 1) == token(7)

    run(test)


def test_tokens_that_come_within_an_interval_come_together_and_others_are_not_delayed() -> None:
    async def test() -> None:
        interval_s = 0.2
        mailroom, stream = opened(interval_s)
        mailroom.send([(stream, token(0))])
        await stream.next()
        began = time.monotonic()
        for token_id in (1, 2, 3):
            mailroom.send([(stream, token(token_id))])
        assert await stream.next() == TokenChunk((1, 2, 3))
        assert time.monotonic() - began > interval_s / 2
        await asyncio.sleep(2.5 * interval_s)  # the model is slower than the interval
        began = time.monotonic()
        mailroom.send([(stream, token(4))])
        assert await stream.next() == token(4)
        assert time.monotonic() - began < interval_s / 2

    run(test)


def test_what_a_slow_reader_has_not_taken_becomes_one_chunk_of_each_sequence() -> None:
    async def test() -> None:
        mailroom, stream = opened(SOON_S, 2)
        score = TokenLogprobs(0, -1.0, 1, ())
        mailroom.send([(stream, TokenChunk((0,), None, 0, (score,), (None, score), cached_tokens=3))])
        mailroom.send([(stream, token(10, 1))])
        mailroom.send([(stream, TokenChunk((1,), None, 0, (score,)))])
        mailroom.send([(stream, token(11, 1, FinishReason.LENGTH))])
        await asyncio.sleep(0.05)
        assert await stream.next() == TokenChunk((0, 1), None, 0, (score, score), (None, score), 3)
        assert await stream.next() == TokenChunk((10, 11), FinishReason.LENGTH, 1)

    run(test)


def test_an_abort_and_an_error_leave_the_tokens_before_them_alone() -> None:
    async def test() -> None:
        for end in (TokenChunk((), FinishReason.ABORT), GenerationError("NaN")):
            mailroom, stream = opened(SOON_S)
            for event in (token(1), token(2), end):
                mailroom.send([(stream, event)])
            await asyncio.sleep(0.05)
            assert [await stream.next(), await stream.next()] == [TokenChunk((1, 2)), end]

    run(test)


def test_streams_that_had_their_last_event_are_over() -> None:
    async def test() -> None:
        mailroom, one = opened(0)
        two, failed = mailroom.open("two", 2), mailroom.open("failed", 2)
        end = FinishReason.STOP
        events = [(one, token(1, 0, end)), (two, token(1, 0, end)), (failed, GenerationError("NaN"))]
        assert mailroom.send(events) == {one, failed}
        assert mailroom.send([(two, token(2, 1, end))]) == {two}

    run(test)


def test_a_stream_whose_event_loop_is_closed_is_over() -> None:
    async def test() -> tuple[Mailroom, Stream]:
        return opened(0)

    mailroom, stream = asyncio.run(test())
    assert mailroom.send([(stream, token(1))]) == {stream}


@pytest.mark.parametrize("interval_s", [0, 0.001, 0.01])
def test_nothing_is_lost_or_out_of_order_whenever_a_thread_sends(interval_s: float) -> None:
    async def test() -> None:
        mailroom = Mailroom(interval_s)
        streams = [mailroom.open(str(number), 1) for number in range(4)]
        count = 300

        def send_all() -> None:
            chance = random.Random(1)
            for token_id in range(count):
                reason = FinishReason.LENGTH if token_id == count - 1 else None
                mailroom.send([(stream, token(token_id, reason=reason)) for stream in streams])
                if chance.random() < 0.2:
                    time.sleep(chance.random() * 0.003)

        sender = threading.Thread(target=send_all)
        sender.start()
        for events in await asyncio.gather(*(all_of(stream, is_last) for stream in streams)):
            chunks = [event for event in events if isinstance(event, TokenChunk)]
            assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(range(count))
            assert len(chunks) < count if interval_s == 0.01 else interval_s > 0 or len(chunks) == count
        sender.join()

    run(test)
