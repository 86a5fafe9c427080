"""`osp serve` as a real process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class ServerProcess:
    """A running `osp serve`."""

    process: subprocess.Popen[str]
    url: str

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Signals the process, waits, and gives its exit code."""
        self.process.send_signal(sig)
        return self.process.wait(timeout=60)


def osp_serve(
    *arguments: str, python: Path = Path(sys.executable), cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Starts `osp serve`. Its stderr is a pipe."""
    return subprocess.Popen(
        [str(python), "-m", "runtime.cli", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


@contextlib.contextmanager
def running_server(
    *arguments: str, python: Path = Path(sys.executable), cwd: Path | None = None, **environment: str
) -> Iterator[ServerProcess]:
    """`osp serve` on a free port, from the moment it says that it serves; killed at the end if still there."""
    process = osp_serve(*arguments, "--port", "0", python=python, cwd=cwd, **environment)
    assert process.stderr is not None
    try:
        log = ""
        for line in process.stderr:
            log += line
            if match := re.search(r"serving .* at (http://\S+)", line):
                yield ServerProcess(process, match[1])
                return
        raise AssertionError(f"the server did not start: {log}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
