"""The load generator: sends what is due when it is due, and watches itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import aiohttp
import numpy as np
from numpy.typing import NDArray

from runtime.loadtest.client import stream_completion
from runtime.loadtest.endpoint import Endpoint, EndpointError
from runtime.loadtest.record import RequestRecord
from runtime.loadtest.workload import Conversation, Turn

LAG_SAMPLE_S = 0.01
"""How often the event loop's lag is looked at."""

TIMER_S = 0.0012
"""What the event loop's timers may be late by: they count in whole milliseconds."""

Progress = Callable[[], None]
"""Is called after each request."""


@dataclass(slots=True)
class Load:
    """What came of a load. It is filled as requests end, so that a load that is cut off leaves what there is.

    Attributes:
        records: of the requests that ended, well or not.
        start_s: when the load began, by `time.perf_counter`.
        cpu_share: of one core that this process used; 1 is all of it.
        loop_lag_p99_ms: 99th percentile of how late the event loop ran what was due.
    """

    records: list[RequestRecord] = field(default_factory=list)
    start_s: float = 0.0
    cpu_share: float = 0.0
    loop_lag_p99_ms: float = 0.0

    @property
    def duration_s(self) -> float:
        """From the start to the last piece of any answer."""
        return max((record.last_s for record in self.records if record.succeeded), default=0.0) - self.start_s

    @property
    def errors(self) -> list[str]:
        """Of the requests that failed."""
        return [record.error for record in self.records if record.error is not None]


class LoadGenerator:
    """Puts one endpoint under load.

    Attributes:
        endpoint: where requests go.
    """

    def __init__(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, *, prefix_cache: bool, progress: Progress
    ) -> None:
        """
        Args:
            session: with the endpoint's headers, the time limit, and no limit of connections.
            prefix_cache: see `Endpoint.request_body`.
        """
        self.endpoint = endpoint
        self._session, self._prefix_cache, self._progress = session, prefix_cache, progress

    async def run(
        self,
        load: Load,
        conversations: Sequence[Conversation],
        due_N: NDArray[np.float64],
        max_concurrency: int | None,
        *,
        closed_loop: bool = False,
    ) -> None:
        """Sends all conversations and waits for the last answer; fills `load`.

        Args:
            due_N: when each is due, in seconds after the start.
            max_concurrency: so many are under way at a time; what is due meanwhile waits, and its waiting counts.
            closed_loop: a conversation is due when its turn comes, as if so many users each waited for the answer to
                the last question before they ask the next. `due_N` is not looked at.

        Raises:
            EndpointError: there are conversations and the server does not tell token ids.
        """
        if any(len(turns) > 1 for turns in conversations) and not self.endpoint.tells_token_ids:
            raise EndpointError(
                f"{self.endpoint.url}: conversations of several turns need the token ids of answers, "
                f"which a server of kind {self.endpoint.kind!r} does not tell"
            )
        lags: list[float] = []
        watcher = asyncio.create_task(_watch_lag(lags))
        cpu_s, load.start_s = time.process_time(), time.perf_counter()

        try:
            if closed_loop:
                await self._closed_loop(load, conversations, max_concurrency or len(conversations))
            else:
                await self._open_loop(load, conversations, due_N, max_concurrency)
        finally:
            watcher.cancel()
            load.cpu_share = (time.process_time() - cpu_s) / max(time.perf_counter() - load.start_s, 1e-9)
            load.loop_lag_p99_ms = 1000 * float(np.percentile(lags, 99)) if lags else 0.0

    async def _closed_loop(self, load: Load, conversations: Sequence[Conversation], users: int) -> None:
        waiting = iter(conversations)

        async def user() -> None:
            for turns in waiting:
                await self._converse(load, turns, time.perf_counter())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(users):
                tasks.create_task(user())

    async def _open_loop(
        self, load: Load, conversations: Sequence[Conversation], due_N: NDArray[np.float64], max_concurrency: int | None
    ) -> None:
        slots = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

        async def converse(turns: Conversation, due_s: float) -> None:
            async with slots:
                await self._converse(load, turns, due_s)

        async with asyncio.TaskGroup() as tasks:
            for turns, after_s in zip(conversations, due_N, strict=True):
                await _sleep_until(load.start_s + float(after_s))
                tasks.create_task(converse(turns, load.start_s + float(after_s)))

    async def _converse(self, load: Load, turns: Conversation, due_s: float) -> None:
        """One turn after the other; each prompt begins with all that was said before. A failed turn is the last."""
        said: tuple[int, ...] = ()
        for number, turn in enumerate(turns):
            asked = turn if number == 0 else replace(turn, prompt=said + tuple(turn.prompt))  # type: ignore[arg-type]
            record = await self._ask(asked, due_s, token_ids=len(turns) > 1)
            load.records.append(record)
            self._progress()
            if not record.succeeded:
                return
            if len(turns) > 1:
                said = (*asked.prompt, *record.token_ids)
            due_s = record.last_s

    async def _ask(self, turn: Turn, due_s: float, *, token_ids: bool) -> RequestRecord:
        record = RequestRecord(scheduled_s=due_s)
        body = self.endpoint.request_body(turn, prefix_cache=self._prefix_cache, token_ids=token_ids)
        await stream_completion(self._session, f"{self.endpoint.url}/completions", body, record)
        return record


async def _sleep_until(due_s: float) -> None:
    """Timers of an event loop are late by up to a millisecond: the rest is waited for actively."""
    if (wait_s := due_s - time.perf_counter()) > TIMER_S:
        await asyncio.sleep(wait_s - TIMER_S)
    while time.perf_counter() < due_s:
        await asyncio.sleep(0)


async def _watch_lag(lags: list[float]) -> None:
    """Sleeps, and notes by how much it overslept, until it is cancelled."""
    while True:
        due_s = time.perf_counter() + LAG_SAMPLE_S
        await asyncio.sleep(LAG_SAMPLE_S)
        lags.append(max(0.0, time.perf_counter() - due_s))
