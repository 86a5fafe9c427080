"""The load test as a whole: servers up, load in turns, sweep, quality, conclusions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from quant.text import read_documents
from runtime.loadtest.contender import Contender
from runtime.loadtest.endpoint import Endpoint, EndpointError
from runtime.loadtest.machine import describe_machine
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.progress import Progress
from runtime.loadtest.quality import QualityProbe, measure_quality
from runtime.loadtest.ratio import ratios
from runtime.loadtest.result import LoadTestResult
from runtime.loadtest.server_process import ServerProcess
from runtime.loadtest.workload import Workload, WorkloadError

UNKNOWN_VOCABULARY = 1000
"""Random ids lie below it where no server says how large its vocabulary is: every one is larger."""

MOST_DOCUMENTS = 100_000
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Placement = Literal["alternate", "halves"]


@dataclass(frozen=True, slots=True)
class Target:
    """A side as the user names it: a checkpoint, for which a server is started, or a URL.

    Attributes:
        model: which of a server's models; None, its first.
    """

    name: str
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_url(self) -> bool:
        """Whether a server is there already."""
        return self.name.startswith(("http://", "https://"))

    @property
    def is_here(self) -> bool:
        """Whether the server is on this machine."""
        return not self.is_url or urlsplit(self.name).hostname in LOOPBACK


@dataclass(frozen=True, slots=True)
class LoadTestSettings:
    """What is done with the two sides.

    Attributes:
        command: that the user gave.
        serve_arguments: more of `osp serve`, for checkpoints.
        placement: "alternate": both servers are up on all cores, and one at a time is under load; "halves": each has
            half of the cores, and both are under load at the same time.
        sweep_seconds: for so long requests arrive at each rate; 0 leaves the sweep out.
        quality_data: held-out text; none leaves the quality out.
        quality_tokens: so many are scored at most.
        timeout_s: of a request.
    """

    workload: Workload
    command: str
    serve_arguments: Sequence[str] = ()
    placement: Placement = "alternate"
    sweep_seconds: float = 20.0
    quality_data: Sequence[Path] = ()
    quality_tokens: int = 20_000
    timeout_s: float = 600.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class LoadTest:
    """Runs once, and has a result at any time: one that is cut off leaves what there is."""

    def __init__(self, targets: Sequence[Target], settings: LoadTestSettings, progress: Progress) -> None:
        """
        Args:
            targets: A, or A and B.
        """
        self._targets, self._settings, self._progress = targets, settings, progress
        self._processes: list[ServerProcess | None] = []
        self._contenders: list[Contender] = []
        self._quality: Mapping[str, Any] = {"unavailable": "the test ended before it was measured"}
        self._invalid_reasons: list[str] = []

    def run(self) -> LoadTestResult:
        """Starts what must be started, measures, and stops it again.

        Ctrl-C, and a server that fails, end the test early; the result then says so and holds what there is.

        Raises:
            EndpointError, WorkloadError: before anything was measured.
            ModelNotFoundError: no model goes by a target's name.
            TextError: the text cannot be read.
            KeyboardInterrupt: Ctrl-C before anything was measured.
        """
        # At once: a mistake in the paths is not to be found after an hour.
        self._settings.workload.conversations(UNKNOWN_VOCABULARY, repeat=0, count=1)
        documents = (
            list(islice(read_documents(self._settings.quality_data), MOST_DOCUMENTS))
            if self._settings.quality_data
            else []
        )
        with ExitStack() as servers:
            for target, cores in zip(self._targets, self._cores(), strict=True):
                process = None
                if not target.is_url:
                    process = servers.enter_context(ServerProcess(target.name, self._settings.serve_arguments, cores))
                self._processes.append(process)
            try:
                asyncio.run(self._measure(documents))
            except KeyboardInterrupt:
                self._end_early("interrupted by Ctrl-C")
            except EndpointError as error:
                self._end_early(str(error))
        return self._result()

    def _end_early(self, reason: str) -> None:
        """Within an `except`: raises again where nothing was measured that could be kept."""
        if not any(contender.side.repeats for contender in self._contenders):
            raise
        self._invalid_reasons.append(reason)

    async def _measure(self, documents: Sequence[str]) -> None:
        async with AsyncExitStack() as stack:
            await self._connect(stack)
            for number in range(self._settings.workload.repeats):
                await self._in_turn(partial(Contender.repeat, number=number))
            if self._settings.sweep_seconds:
                await self._in_turn(partial(Contender.sweep, seconds=self._settings.sweep_seconds))
            if documents:
                await self._measure_quality(documents)
            else:
                self._quality = {"unavailable": "no held-out text was given (--quality-data)"}

    async def _connect(self, stack: AsyncExitStack) -> None:
        settings, found = self._settings, []
        for target, process in zip(self._targets, self._processes, strict=True):
            session = await stack.enter_async_context(open_session(target.headers, settings.timeout_s))
            url = process.url if process else target.name
            found.append(
                (session, await find_endpoint(session, url, target.model, target.headers, settings.extra_body))
            )
        self._check_lengths([endpoint for _, endpoint in found])
        sizes = [endpoint.vocab_size for _, endpoint in found if endpoint.vocab_size is not None]
        vocab_size = min(sizes) if len(sizes) == len(found) else UNKNOWN_VOCABULARY
        for letter, target, process, (session, endpoint) in zip(
            "AB", self._targets, self._processes, found, strict=False
        ):
            self._contenders.append(
                Contender(
                    letter,
                    target.name,
                    endpoint,
                    session,
                    process,
                    settings.workload,
                    vocab_size,
                    self._progress,
                    counts_energy=target.is_here and settings.placement == "alternate",
                )
            )

    def _check_lengths(self, endpoints: Sequence[Endpoint]) -> None:
        longest = self._settings.workload.longest
        for endpoint in endpoints:
            if endpoint.context_length is not None and longest > endpoint.context_length:
                raise WorkloadError(
                    f"{endpoint.model} has a context of {endpoint.context_length} tokens, and requests with their "
                    f"answers have {longest}; lower --random-input-len or --random-output-len"
                )

    async def _in_turn(self, load: Callable[[Contender], Coroutine[Any, Any, None]]) -> None:
        """One after the other, or, where each has cores of its own, both at once."""
        if self._settings.placement == "halves":
            await asyncio.gather(*(load(contender) for contender in self._contenders))
            return
        for contender in self._contenders:
            await load(contender)

    async def _measure_quality(self, documents: Sequence[str]) -> None:
        with self._progress.phase("quality", 0) as advance:
            probes = [QualityProbe(contender.session, contender.endpoint, advance) for contender in self._contenders]
            self._quality = await measure_quality(probes, documents, self._settings.quality_tokens)

    def _cores(self) -> list[Collection[int] | None]:
        """Of each server; None, all.

        Raises:
            WorkloadError: halves, and there are no two checkpoints and two cores.
        """
        if self._settings.placement == "alternate":
            return [None] * len(self._targets)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2 or len(self._targets) < 2 or any(target.is_url for target in self._targets):
            raise WorkloadError("halves of the cores need two checkpoints, and two cores or more")
        half = len(cores) // 2
        return [cores[:half], cores[half : 2 * half]]

    def _result(self) -> LoadTestResult:
        settings, sides = self._settings, [contender.side for contender in self._contenders]
        for contender in self._contenders:
            contender.finish()
            self._invalid_reasons += contender.invalid_reasons
        a, b = sides[0], sides[1] if len(sides) > 1 else None
        return LoadTestResult(
            osp_version=version("osp-runtime"),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commands=[settings.command, *(" ".join(process.command) for process in self._processes if process)],
            machine=describe_machine(),
            workload=settings.workload.to_dict()
            | {"placement": settings.placement, "sweep_seconds": settings.sweep_seconds},
            A=a,
            B=b,
            ratio=ratios(a, b) if b else {},
            quality=self._quality,
            invalid_reasons=list(dict.fromkeys(self._invalid_reasons)),
        )
