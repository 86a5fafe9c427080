"""NVIDIA's GPUs, as NVML tells: the energy that they used, the memory that a server holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pynvml

from runtime.loadtest.server_process import session_of


class Gpu:
    """One GPU, a counter of energy among others.

    Attributes:
        source: its name.
    """

    def __init__(self, handle: Any) -> None:
        """
        Args:
            handle: NVML's.
        """
        self.source = str(pynvml.nvmlDeviceGetName(handle))
        self._handle = handle
        self._first_J = self._counter_J()

    def joules(self) -> float | None:
        """Since this object was made, of the whole GPU; None where it does not count (before Volta)."""
        now_J = self._counter_J()
        return None if now_J is None or self._first_J is None else now_J - self._first_J

    def held_bytes(self, session: int) -> int | None:
        """What the processes of a session hold now; None where none of them is here, or NVML does not tell."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        held = [process.usedGpuMemory for process in processes if session_of(process.pid) == session]
        return None if not held or None in held else sum(held)

    def _counter_J(self) -> float | None:  # noqa: N802 - the unit
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000  # mJ since the driver started
        except pynvml.NVMLError:
            return None


def find_gpus() -> list[Gpu]:
    """All GPUs of this machine; none where NVIDIA's driver is not."""
    try:
        pynvml.nvmlInit()
        return [Gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def gpu_memory_MB(gpus: Sequence[Gpu], session: int) -> float | None:  # noqa: N802 - the unit
    """What the processes of a session hold now, on all GPUs, 10^6 bytes; None where they hold nothing that is known.

    Args:
        session: the id of the process that began it; its workers belong to it.
    """
    held = [held for gpu in gpus if (held := gpu.held_bytes(session)) is not None]
    return sum(held) / 1e6 if held else None
