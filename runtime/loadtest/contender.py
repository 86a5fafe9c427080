"""One side of the test while it runs: its server, the generator that loads it, and what has been found."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import aiohttp
import numpy as np

from runtime.loadtest.arrivals import arrival_times
from runtime.loadtest.endpoint import Endpoint, EndpointError
from runtime.loadtest.energy import EnergyMeter, rapl_zones
from runtime.loadtest.figures import Figures, figures, samples
from runtime.loadtest.generator import Load, LoadGenerator
from runtime.loadtest.gpu import find_gpus, gpu_memory_MB
from runtime.loadtest.progress import Progress
from runtime.loadtest.result import Repeat, Side
from runtime.loadtest.server_metrics import RESIDENT, MetricsPage, compare_metrics, read_metrics
from runtime.loadtest.server_process import ServerProcess
from runtime.loadtest.sweep import Sweep, max_rate_at_slo, saturation
from runtime.loadtest.validity import invalid_generator, invalid_repeat, invalid_side
from runtime.loadtest.workload import Conversation, Workload, total_requests

WARM_UP, SWEEP = 1_000_000, 2_000_000
"""Where the seeds of what is no repeat begin."""

FEWEST_REQUESTS = 10
"""Of a rate of the sweep, however short."""


class Contender:
    """A or B.

    Attributes:
        letter: "A" or "B".
        side: what has been found so far.
        endpoint, session: where it is, and how it is reached.
        invalid_reasons: what has gone wrong so far.
    """

    def __init__(
        self,
        letter: str,
        target: str,
        endpoint: Endpoint,
        session: aiohttp.ClientSession,
        process: ServerProcess | None,
        workload: Workload,
        vocab_size: int,
        progress: Progress,
        *,
        counts_energy: bool,
    ) -> None:
        """
        Args:
            target: as the user gave it.
            process: of the server, if this program has started it.
            vocab_size: prompts of random tokens have ids below it.
            counts_energy: the server is on this machine, and no other one is under load meanwhile.
        """
        self.letter, self.endpoint, self.session = letter, endpoint, session
        self.invalid_reasons: list[str] = []
        self.side = Side(endpoint.model, target, endpoint.url, endpoint.engine, endpoint.precision, endpoint.kernel)
        if process:
            self.side.threads, self.side.load_seconds = process.threads, process.load_seconds
            self.side.weight_bytes = process.weight_bytes
        self._process, self._workload, self._vocab_size, self._progress = process, workload, vocab_size, progress
        self._gpus = find_gpus()
        self._energy = EnergyMeter([*rapl_zones(), *self._gpus] if counts_energy else [])
        self.side.energy_sources = self._energy.sources
        self._joules, self._tokens_of_joules = 0.0, 0

    async def repeat(self, number: int) -> None:
        """Warms the server up, puts it under the workload's load, and adds what came of it to `side`.

        Raises:
            EndpointError: every request failed.
        """
        workload = self._workload
        await self._warm_up()
        conversations = workload.conversations(self._vocab_size, number)
        rate = workload.request_rate
        before, joules = await self._metrics(), self._energy.joules()
        load = Load()
        try:
            await self._load(load, f"repeat {number + 1} of {workload.repeats}", conversations, rate, number)
        except asyncio.CancelledError:
            if not self.side.repeats and any(record.succeeded for record in load.records):
                self._add(load)  # better than nothing
            raise
        after, joules_after = await self._metrics(), self._energy.joules()
        compare_metrics(self.side.server_metrics, before, after, load.records)
        self._add(load)
        if joules is not None and joules_after is not None:
            self._joules += joules_after - joules
            self._tokens_of_joules += int(self.side.repeats[-1].figures["total_output_tokens"])
            self.side.energy_J_per_token = self._joules / max(self._tokens_of_joules, 1)
        self._measure_memory(after.values.get(RESIDENT) if after else None)

    async def sweep(self, seconds: float) -> None:
        """Finds saturation and the highest rate that keeps the service level; needs a repeat.

        Args:
            seconds: for so long requests arrive at each rate.

        Raises:
            EndpointError: every request of a rate failed.
        """
        throughput = self.side.medians()["request_throughput"]
        most = max(FEWEST_REQUESTS, math.ceil(2 * throughput * seconds))

        async def measure(rate: float) -> Figures:
            # All rates have the same requests, as far as they go.
            count = min(most, max(FEWEST_REQUESTS, math.ceil(rate * seconds)))
            conversations = self._workload.conversations(self._vocab_size, SWEEP, count)
            load = Load()
            await self._load(load, f"sweep, {rate:.3g} requests/s", conversations, rate, SWEEP)
            self._require_answers(load)
            self.invalid_reasons += invalid_generator(self.letter, load)
            return figures(load.records, load.duration_s, self._workload.slo)

        sweep = Sweep(measure, self._workload.slo)
        self.side.sweep = sweep.points
        await sweep.run(throughput)

    def finish(self) -> None:
        """Draws conclusions from what there is."""
        side = self.side
        side.sweep.sort(key=lambda point: point.request_rate)
        side.saturation = saturation(side.sweep, side.medians(), self._workload.request_rate)
        side.max_rate_at_slo = max_rate_at_slo(side.sweep)
        self.invalid_reasons += invalid_side(self.letter, side, self._workload)

    async def _warm_up(self) -> None:
        count = self._workload.warmups
        if count:
            conversations = self._workload.conversations(self._vocab_size, WARM_UP, count)
            await self._load(Load(), "warm-up", conversations, None, WARM_UP)

    async def _load(
        self, load: Load, label: str, conversations: Sequence[Conversation], rate: float | None, seed: int
    ) -> None:
        """At a rate, or in a closed loop."""
        workload, count = self._workload, len(conversations)
        due_N = (
            np.zeros(count) if rate is None else arrival_times(count, rate, workload.burstiness, workload.seed + seed)
        )
        with self._progress.phase(f"{self.letter} {label}", total_requests(conversations)) as advance:
            generator = LoadGenerator(self.session, self.endpoint, prefix_cache=workload.prefix_cache, progress=advance)
            # At a rate, nothing but the server decides how many are under way, unless the user says so for the repeats.
            limit = workload.max_concurrency if rate == workload.request_rate else None
            await generator.run(load, conversations, due_N, limit, closed_loop=rate is None)

    def _add(self, load: Load) -> None:
        self._require_answers(load)
        self.invalid_reasons += invalid_repeat(self.letter, load)
        side = self.side
        side.cpu_share = max(side.cpu_share, load.cpu_share)
        side.loop_lag_p99_ms = max(side.loop_lag_p99_ms, load.loop_lag_p99_ms)
        side.repeats.append(Repeat(figures(load.records, load.duration_s, self._workload.slo), samples(load.records)))

    def _require_answers(self, load: Load) -> None:
        if load.records and not any(record.succeeded for record in load.records):
            raise EndpointError(
                f"{self.letter} ({self.endpoint.url}): all {len(load.records)} requests failed; the first: "
                f"{load.errors[0]}"
            )

    async def _metrics(self) -> MetricsPage | None:
        return await read_metrics(self.session, self.endpoint.root, self.endpoint.model)

    def _measure_memory(self, resident: float | None) -> None:
        """Of a server of ours the peak; of another one the most that its metrics said after a repeat."""
        side = self.side
        rss_MB = self._process.peak_rss_MB() if self._process else None
        if rss_MB is None and resident is not None:
            rss_MB = resident / 1e6
        side.peak_rss_MB = max((seen for seen in (side.peak_rss_MB, rss_MB) if seen is not None), default=None)
        side.gpu_memory_MB = gpu_memory_MB(self._gpus, self._process.pid) if self._process else None
