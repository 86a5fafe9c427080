"""What a load test found: the object that `result.json` holds, that `--json` prints and that the report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.loadtest.figures import Figures, Samples, median_figures


@dataclass(slots=True)
class Repeat:
    """One load on one side: `vllm bench serve`'s figures, and the latencies (ms) that they are made of."""

    figures: Figures
    samples: Samples


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One rate of the sweep.

    Attributes:
        request_rate: requests a second that arrived.
        latencies (ms): None where no request was answered.
        meets_slo: no request failed, and the 99th percentiles of TTFT and TPOT keep the service level.
    """

    request_rate: float
    completed: int
    failed: int
    request_throughput: float
    request_goodput: float
    output_throughput: float
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    median_tpot_ms: float | None
    p99_tpot_ms: float | None
    meets_slo: bool


@dataclass(frozen=True, slots=True)
class Saturation:
    """The most output tokens a second that were seen, and at which rate; None: closed loop, as many as it takes."""

    output_throughput: float
    request_rate: float | None


@dataclass(frozen=True, slots=True)
class RateAtSlo:
    """The highest rate of the sweep at which the service level was kept, and the good requests a second there."""

    request_rate: float
    request_goodput: float


@dataclass(slots=True)
class ServerAgreement:
    """Whether the server's own `/metrics`, before and after every load, agree with what the client saw.

    Attributes:
        checked: the metrics that were compared; empty where the server has none that are known here.
        differences: a sentence for each that does not agree.
    """

    checked: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool | None:
        """None where nothing could be compared."""
        return not self.differences if self.checked else None


@dataclass(slots=True)
class Side:
    """A or B. None is "not measured".

    Attributes:
        name: what people call it.
        target: as it was given: a checkpoint or a URL.
        engine, precision, kernel: as the server says; threads: where this program started the server.
        load_seconds: from the start of the process until it answers that it is ready.
        peak_rss_MB, gpu_memory_MB: of the server, 10^6 bytes.
        weight_bytes: size of the weight files.
        energy_J_per_token: of the whole machine, of the repeats, a token that came out; energy_sources: what is in it.
        cpu_share: of one core that the generator used, the highest of the repeats; 1 is all of it.
        loop_lag_p99_ms: how late the generator's event loop ran what was due, the highest of the repeats.
    """

    name: str
    target: str
    url: str
    engine: str | None = None
    precision: str | None = None
    kernel: str | None = None
    threads: int | None = None
    load_seconds: float | None = None
    peak_rss_MB: float | None = None  # noqa: N815 - the unit
    gpu_memory_MB: float | None = None  # noqa: N815
    weight_bytes: int | None = None
    energy_J_per_token: float | None = None  # noqa: N815
    energy_sources: list[str] = field(default_factory=list)
    cpu_share: float = 0.0
    loop_lag_p99_ms: float = 0.0
    server_metrics: ServerAgreement = field(default_factory=ServerAgreement)
    repeats: list[Repeat] = field(default_factory=list)
    sweep: list[SweepPoint] = field(default_factory=list)
    saturation: Saturation | None = None
    max_rate_at_slo: RateAtSlo | None = None

    def medians(self) -> Figures:
        """Of every figure, the median over the repeats."""
        return median_figures([repeat.figures for repeat in self.repeats])

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, with the medians among the side's own fields."""
        values = asdict(self)
        client = {name: values.pop(name) for name in ("cpu_share", "loop_lag_p99_ms")}
        repeats = [{**repeat.figures, "samples": repeat.samples} for repeat in self.repeats]
        agreement = {"agrees": self.server_metrics.agrees, **asdict(self.server_metrics)}
        return values | self.medians() | {"client": client, "server_metrics": agreement, "repeats": repeats}


@dataclass(frozen=True, slots=True)
class Ratio:
    """A over B.

    Attributes:
        median: of the repeats' ratios.
        low, high: 95 % confidence interval of the geometric mean; None with fewer than two repeats.
    """

    median: float
    low: float | None
    high: float | None


@dataclass(slots=True)
class LoadTestResult:
    """The whole. `machine`, `workload` and `quality` are as docs/loadtest.md says."""

    osp_version: str
    date: str
    commands: list[str]
    machine: Mapping[str, Any]
    workload: Mapping[str, Any]
    A: Side
    B: Side | None = None
    ratio: dict[str, Ratio] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=lambda: {"unavailable": "not reached"})
    invalid_reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """`result.json`."""
        sides = {"A": self.A.to_dict(), "B": self.B.to_dict() if self.B else None}
        head = {name: getattr(self, name) for name in ("osp_version", "date", "commands", "machine", "workload")}
        ratio = {name: asdict(value) for name, value in self.ratio.items()}
        validity = {"valid": not self.invalid_reasons, "invalid_reasons": self.invalid_reasons}
        return {**head, **sides, "ratio": ratio, "quality": self.quality, **validity}

    def summary(self) -> dict[str, Any]:
        """The same without the repeats and their samples: what `--json` prints."""
        values = self.to_dict()
        for side in ("A", "B"):
            if values[side]:
                del values[side]["repeats"]
        return values
