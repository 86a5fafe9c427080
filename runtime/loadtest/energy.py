"""Energy that the machine used, where it tells: Intel's and AMD's RAPL counters of processor packages."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts joules of all packages. They are those of the whole machine: of the client and of neighbours, too."""

    def __init__(self, root: Path = POWERCAP) -> None:
        """Looks for counters that may be read; on most systems only root may."""
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it; AMD's go by the same name.
        self._zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._last_uJ = self._read()
        self._joules = 0.0

    @property
    def available(self) -> bool:
        """Whether there is a counter that may be read."""
        return self._last_uJ is not None

    def joules(self) -> float | None:
        """Since the meter was made; None where there is no counter. Call it at least once an hour: counters wrap."""
        now_uJ = self._read()
        if now_uJ is None or self._last_uJ is None:
            return None
        for zone, last in self._last_uJ.items():
            grown = now_uJ[zone] - last
            self._joules += (grown if grown >= 0 else grown + _number(zone / "max_energy_range_uj")) / 1e6
        self._last_uJ = now_uJ
        return self._joules

    def _read(self) -> dict[Path, int] | None:
        try:
            return {zone: _number(zone / "energy_uj") for zone in self._zones} or None
        except OSError:  # not for this user
            return None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))
