"""The harness's side of `benchmarks.worker`: starts a worker, asks it, and keeps it still in between.

A worker that is not asked is stopped (SIGSTOP). Thread pools of some engines spin while they wait for work, which makes
these engines faster, and would slow down whichever is measured next. So each may spin as it likes in its own time.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOG_LINES = 8


class WorkerError(RuntimeError):
    """A worker failed; the message names it, says what happened, and where to read on."""


class WorkerProcess:
    """A worker; stopped, except while it starts and while it is asked."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        directory: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Starts the process and waits until its engine is loaded.

        Args:
            name: what errors call it.
            log: where its standard error goes.
            directory: where it starts; here, if left out.
            timeout_s: for loading, and for each answer, in seconds.

        Raises:
            WorkerError: it ended or did not answer in time.
            OSError: the command cannot be run.
        """
        self.name, self._log, self._timeout_s = name, log, timeout_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
                bufsize=0,  # select() must see every byte that has come
            )
        try:
            greeting = self._read()
            self.about: Mapping[str, str] = greeting["ready"]
            self.measures: Sequence[str] = greeting["measures"]
        except BaseException:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request of the protocol.

        Raises:
            WorkerError: it cannot measure that, or it ended, or it did not answer in time.
        """
        self._process.send_signal(signal.SIGCONT)
        try:
            self._write(request)
            answer = self._read()
        finally:
            self._process.send_signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}; asked for {dict(request)}; log: {self._log}")
        return answer

    def rss_mb(self) -> float:
        """Memory that the process holds now, in 10^6 bytes; pages of mapped files count."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        """Processor time that all its threads used so far, in seconds."""
        # The name, in brackets, may hold spaces; user and system time are the 12th and 13th field behind it.
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self, patience_s: float = 10.0) -> None:
        """Ends the process: by the end of its input, or by force if that takes longer than `patience_s` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._ended() from error

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._timeout_s)[0]:
            raise WorkerError(f"{self.name}: no answer within {self._timeout_s:g} s; log: {self._log}")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        message: dict[str, Any] = json.loads(line)
        return message

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        last = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        return WorkerError(f"{self.name}: ended with status {status}; the end of {self._log}:\n{last}")
