"""Energy that the machine used, where it tells: processors and memory by RAPL's counters, GPUs by NVML's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter(Protocol):
    """Counts joules since it was made.

    Attributes:
        source: what they are of.
    """

    source: str

    def joules(self) -> float | None:
        """So far; None, it cannot be read."""


class RaplZone:
    """One of RAPL's counters, Intel's or AMD's. Read it at least once an hour: it wraps."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: of the zone, in `POWERCAP`.
        """
        self.source = (directory / "name").read_text(encoding="ascii").strip()
        self._directory, self._joules = directory, 0.0
        self._last_uJ = self._read("energy_uj")

    def joules(self) -> float | None:
        """Those of the whole machine: the client's and the neighbours' are among them."""
        now_uJ = self._read("energy_uj")
        if now_uJ is None or self._last_uJ is None:
            return None
        grown_uJ = now_uJ - self._last_uJ
        if grown_uJ < 0:
            grown_uJ += self._read("max_energy_range_uj") or 0
        self._joules, self._last_uJ = self._joules + grown_uJ / 1e6, now_uJ
        return self._joules

    def _read(self, name: str) -> int | None:
        try:
            return int((self._directory / name).read_text(encoding="ascii"))
        except OSError:  # on most systems only root may
            return None


def rapl_zones(root: Path | None = None) -> list[RaplZone]:
    """Processor packages, and memory where it has a counter of its own; each joule is in one of them.

    Cores and graphics are parts of their package, and the package is a part of "psys", the whole board.

    Args:
        root: default `POWERCAP`.
    """
    zones = [RaplZone(directory) for directory in sorted((root or POWERCAP).glob("intel-rapl:*"))]
    return [zone for zone in zones if zone.source.startswith("package") or zone.source == "dram"]


class EnergyMeter:
    """The sum of all counters that can be read.

    Attributes:
        sources: what they are of.
    """

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters = [counter for counter in counters if counter.joules() is not None]
        self.sources = [counter.source for counter in self._counters]

    def joules(self) -> float | None:
        """Since the counters were made; None where there is none, or one can no longer be read."""
        counted = [counter.joules() for counter in self._counters]
        known = [joules for joules in counted if joules is not None]
        return sum(known) if known and len(known) == len(counted) else None
