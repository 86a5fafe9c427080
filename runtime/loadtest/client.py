"""Sends one completion and takes down when each piece of its answer comes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from runtime.loadtest.record import RequestRecord

_DATA = b"data:"
_DONE = b"[DONE]"


class StreamError(Exception):
    """An answer that is not a whole stream; the message says what came instead."""


async def stream_completion(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], record: RequestRecord
) -> None:
    """Sends `body` to `url` and fills `record`.

    A piece of the answer is an event that has a choice, be its text empty: some tokens have none, and
    `vllm bench serve` counts so too. Whatever goes wrong stands in `record.error`; what had come by then is kept.

    Raises:
        asyncio.CancelledError: the caller gave up.
    """
    try:
        record.sent_s = time.perf_counter()
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise StreamError(await refusal(response))
            await _read(response.content, record)
    except asyncio.CancelledError:
        record.error = "cancelled"
        raise
    except TimeoutError:
        record.error = "no whole answer within the time limit (--request-timeout)"
    except aiohttp.ClientConnectionError as error:
        record.error = f"the connection failed: {error}" + _so_far(record)
    except aiohttp.ClientPayloadError:
        record.error = "the server closed the connection in the middle of its answer" + _so_far(record)
    except (StreamError, aiohttp.ClientError) as error:
        record.error = str(error)


async def post_json(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object that `url` answers to `body`.

    Raises:
        StreamError: it answers with an error or with something else, or not at all.
    """
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise StreamError(await refusal(response))
            return _parsed(await response.read())
    except TimeoutError as error:
        raise StreamError("no answer within the time limit (--request-timeout)") from error
    except aiohttp.ClientError as error:
        raise StreamError(f"the connection failed: {error}") from error


async def refusal(response: aiohttp.ClientResponse) -> str:
    """An answer that is not 200, in words: the status and the server's own message."""
    text = await response.text(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return f"HTTP {response.status}: {_message(answer) or text.strip()[:200] or response.reason}"


async def _read(stream: aiohttp.StreamReader, record: RequestRecord) -> None:
    texts = []
    async for now_s, event in _events(stream):
        if "error" in event:
            raise StreamError(f"the server ended the stream with an error: {_message(event)}" + _so_far(record))
        try:
            if usage := event.get("usage"):
                record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if choices := event.get("choices"):
                record.piece(now_s)
                texts.append(choices[0].get("text") or "")
                record.token_ids += choices[0].get("token_ids") or ()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise StreamError(f"an event that is none of a completion: {str(event)[:100]}") from error
    record.text = "".join(texts)
    if record.first_s is None:
        raise StreamError("the answer is a stream without a single piece of text")
    # A server that counts nothing: one token a piece is the best guess there is.
    record.output_tokens = record.output_tokens or len(record.gaps_s) + 1


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """The events of a stream up to [DONE], each with the time at which its last byte was there to be read."""
    rest = b""
    async for part in stream.iter_any():
        now_s = time.perf_counter()  # before anything is parsed: that is the client's time, not the server's
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):  # blank, a comment that keeps the connection, another field
                continue
            data = line[len(_DATA) :].strip()
            if data == _DONE:
                return
            yield now_s, _parsed(data)
    raise StreamError("the stream ended without [DONE]")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise StreamError(f"an event that is no JSON object: {data[:100]!r}")
    return event


def _message(answer: object) -> str | None:
    """The message in an error object, OpenAI's form and that of others."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else None


def _so_far(record: RequestRecord) -> str:
    pieces = 0 if record.first_s is None else len(record.gaps_s) + 1
    return f", after {pieces} pieces of it"
