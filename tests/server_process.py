"""`osp serve` as a real process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

EVENT_A_TOKEN = ("--stream-interval", "0")
"""Has a stream's tokens come one by one, for tests that count them."""


class ServerLog:
    """What a process writes to stderr, read as it comes: a pipe that nobody empties would stop the server."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        """The lines so far."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """The first match of a line, once it is there."""

        def match() -> re.Match[str] | None:
            return next((found for line in self._lines if (found := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: match() or self._ended, timeout)
            found = match()
        assert found is not None, f"no line with {pattern!r} in the server's log:\n{''.join(self._lines)}"
        return found

    def close(self) -> None:
        """Waits for the end of the stream."""
        self._reader.join()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class ServerProcess:
    """A running `osp serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process = process
        self.log = ServerLog(process.stderr)
        self.url = ""

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Signals the process, waits, and gives its exit code. If that is not 0, the test's output has the log."""
        self.process.send_signal(sig)
        code = self.process.wait(timeout=60)
        if code:
            self.log.close()
            sys.stdout.writelines(self.log.lines)
        return code


def osp_serve(
    *arguments: str,
    python: Path = Path(sys.executable),
    cwd: Path | None = None,
    before: str | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts `osp serve`. Its stderr is a pipe.

    Args:
        before: Python code that the process runs first, to break something in it.
    """
    start = ["-m", "runtime.cli"] if before is None else ["-c", f"{before}\nimport runtime.cli; runtime.cli.main()"]
    return subprocess.Popen(
        [str(python), *start, "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        process_group=0,
    )


@contextlib.contextmanager
def running_server(
    *arguments: str,
    python: Path = Path(sys.executable),
    cwd: Path | None = None,
    before: str | None = None,
    until: str = "serving",
    start_s: float = 60,
    **environment: str,
) -> Iterator[ServerProcess]:
    """`osp serve` on a free port; killed at the end if still there.

    Args:
        until: yields when the log says so of an address: "serving", or "listening", which is before the models are
            loaded.
        start_s: how long that may take.
    """
    server = ServerProcess(osp_serve(*arguments, "--port", "0", python=python, cwd=cwd, before=before, **environment))
    try:
        server.url = server.log.wait_for(rf"{until}\b.* at (https?://[^\s;\"]+)", start_s)[1]
        yield server
    finally:
        # The processes that it has started too: they hold its log open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.log.close()
