"""The machine that the load test runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""The features of a processor, as Linux names them, that matrix products hang on."""


def describe_machine() -> dict[str, Any]:
    """The field `machine` of the result: processor, the cores that this process may use, memory in 10^9 bytes."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
    }


def _cpu_info() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
