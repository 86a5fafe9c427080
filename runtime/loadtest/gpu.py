"""Memory of NVIDIA GPUs, as `nvidia-smi` tells it."""

from __future__ import annotations

import os
import shutil
import subprocess

_QUERY = ("--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")


def gpu_memory_MB(session: int) -> float | None:  # noqa: N802 - the unit
    """What the processes of a session hold now, on all GPUs, 10^6 bytes; None where there is no `nvidia-smi`.

    Args:
        session: the id of the process that began it; its workers belong to it.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    answer = subprocess.run([program, *_QUERY], capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    rows = [line.split(",") for line in answer.stdout.splitlines() if line.strip()]
    return sum(float(held) * 2**20 / 1e6 for pid, held in rows if _session_of(int(pid)) == session)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
