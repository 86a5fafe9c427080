"""`osp serve` for a checkpoint: started, waited for, measured and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from runtime.loadtest.endpoint import EndpointError
from runtime.model_store import resolve_model

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
LOG_LINES = 5
"""Of a server that does not start: what is shown."""

_SERVING = re.compile(r"serving .* at (https?://\S+)")
_THREADS = re.compile(r"native engine: kernel \S+, (\d+) threads")


class ServerProcess:
    """A server of this machine, in a process group of its own: Ctrl-C reaches it only through this program.

    Attributes:
        command: as it was started.
        url: where it answers.
        load_seconds: from its start until it served.
        threads: that compute, as its log says; None where it does not.
        weight_bytes: size of the checkpoint's weight files.
    """

    def __init__(self, model: str, arguments: Sequence[str], cores: Collection[int] | None = None) -> None:
        """Starts it and waits until it serves.

        Args:
            model: as `osp serve` takes it.
            arguments: more of `osp serve`.
            cores: that it may run on; None, all.

        Raises:
            ModelNotFoundError: no model goes by that name.
            EndpointError: the server ended, or is not ready in time; the message has the end of its log.
        """
        self.command = ["osp", "serve", model, "--port", "0", *arguments]
        self.weight_bytes = sum(file.stat().st_size for file in resolve_model(model).glob("*.safetensors"))
        self._log = tempfile.NamedTemporaryFile("w+", encoding="utf-8", prefix="osp-serve-", suffix=".log")  # noqa: SIM115
        began = time.perf_counter()
        self._process = self._start(cores)
        try:
            self.url = self._wait_until_serving(began + START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - began
        threads = _THREADS.search(self._read_log())
        self.threads = int(threads[1]) if threads else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server, and of its process group and session."""
        return self._process.pid

    def peak_rss_MB(self) -> float | None:  # noqa: N802 - the unit
        """The most memory that the server has had resident, 10^6 bytes; None once it has ended.

        Of several processes (vLLM's) the sum of what each had at most; what they share counts in each.
        """
        numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        peaks = [_peak_rss_kB(pid) for pid in numbers if session_of(pid) == self.pid]
        return sum(peaks) * 1024 / 1e6 or None

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _start(self, cores: Collection[int] | None) -> subprocess.Popen[bytes]:
        before = os.sched_getaffinity(0)
        # A child inherits its parent's cores; set afterwards, they would not bind the threads that it has by then.
        os.sched_setaffinity(0, cores or before)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "runtime.cli", *self.command[1:], "--drain-timeout", "0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)

    def _wait_until_serving(self, until_s: float) -> str:
        while time.perf_counter() < until_s:
            log = self._read_log()
            if serving := _SERVING.search(log):
                return serving[1]
            if self._process.poll() is not None:
                raise EndpointError(
                    f"`{' '.join(self.command)}` has ended with {self._process.returncode}:\n{_end(log)}"
                )
            time.sleep(POLL_S)
        raise EndpointError(f"`{' '.join(self.command)}` does not serve after {START_TIMEOUT_S:.0f} s:\n{_end(log)}")

    def _read_log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")


def session_of(pid: int) -> int | None:
    """The id of the process that began a process's session; None once the latter has gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _peak_rss_kB(pid: int) -> int:  # noqa: N802 - the unit
    """0 once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) if peak else 0


def _end(log: str) -> str:
    return "\n".join(log.splitlines()[-LOG_LINES:])
