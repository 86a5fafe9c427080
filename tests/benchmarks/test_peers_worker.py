"""Workers that are real processes with a bench made up: what they answer, and that they are still in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.worker_process import WorkerError, WorkerProcess

ROOT = Path(__file__).resolve().parents[2]

BENCH = """
import os, sys, threading, time
from benchmarks.worker import UnsupportedError, serve

def spin():
    while True:
        pass

class Bench:
    def __init__(self):
        threading.Thread(target=spin, daemon=True).start()  # as thread pools do that wait for work
        self.memory = []
    def decode(self, batch, context, tokens):
        if context == 404:
            raise UnsupportedError("no such context")
        if context == 500:
            os._exit(3)
        return 1000.0 * batch + context + tokens / 100
    def prefill(self, tokens):
        if tokens == 1:
            time.sleep(0.2)
            return time.process_time()
        self.memory.append(b"x" * (tokens << 20))
        return float(tokens)
    def limits(self):
        return {"read_GBps": 24.5, "dot_GOPS": 1254.0}
    def close(self):
        print("closed", file=sys.stderr)

serve(Bench, {"engine": "made up"})
"""
LIBRARY_PRINTS = """
import ctypes
from benchmarks.worker import serve

class Bench:
    def decode(self, batch, context, tokens):
        print("from Python", flush=True)
        ctypes.CDLL(None).puts(b"from C")
        ctypes.CDLL(None).fflush(None)
        return 7.0
    def prefill(self, tokens):
        return 1.0
    def close(self):
        pass

serve(Bench, {})
"""


def decode(context: int) -> dict[str, object]:
    return {"measure": "decode", "batch": 8, "context": context, "tokens": 32}


def prefill(tokens: int) -> dict[str, object]:
    return {"measure": "prefill", "tokens": tokens}


def start(tmp_path: Path, code: str, timeout_s: float = 60) -> WorkerProcess:
    log = tmp_path / "logs" / "worker.log"
    return WorkerProcess("made-up", [sys.executable, "-c", code], log, directory=ROOT, timeout_s=timeout_s)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with start(tmp_path, BENCH) as process:
        yield process


def test_what_is_asked_is_measured(worker: WorkerProcess) -> None:
    assert worker.about == {"engine": "made up"}
    assert worker.measures == ["decode", "prefill", "limits"]
    assert worker.ask(decode(1500)) == {"tok_s": 9500.32}
    assert worker.ask(prefill(3)) == {"tok_s": 3.0}
    assert worker.ask({"measure": "limits"}) == {"read_GBps": 24.5, "dot_GOPS": 1254.0}


def test_what_cannot_be_measured_is_an_error_and_not_the_end(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match=r"made-up: UnsupportedError: no such context; asked for .*404"):
        worker.ask(decode(404))
    with pytest.raises(WorkerError, match="cannot measure 'latency'"):
        worker.ask({"measure": "latency"})
    assert worker.ask(prefill(3)) == {"tok_s": 3.0}


def test_a_worker_that_spins_is_still_until_asked(worker: WorkerProcess) -> None:
    before = worker.cpu_s()
    time.sleep(0.5)
    assert worker.cpu_s() - before <= 0.02  # a tick of the kernel's clock is 0.01 s
    worker.ask(prefill(1))
    assert worker.cpu_s() - before > 0.03


def test_processor_time_is_what_the_process_counts_itself(worker: WorkerProcess) -> None:
    before = worker.cpu_s()
    counted = worker.ask(prefill(1))["tok_s"]
    assert before - 0.02 <= counted <= worker.cpu_s() + 0.02


def test_memory_grows_by_what_is_allocated(worker: WorkerProcess) -> None:
    before = worker.rss_mb()
    worker.ask(prefill(64))
    assert worker.rss_mb() - before == pytest.approx(64 * 2**20 / 1e6, abs=5)


def test_a_bench_without_limits_says_so_and_printing_disturbs_no_reply(tmp_path: Path) -> None:
    with start(tmp_path, LIBRARY_PRINTS) as worker:
        assert worker.measures == ["decode", "prefill"]
        assert worker.ask(decode(0)) == {"tok_s": 7.0}
        with pytest.raises(WorkerError, match="cannot measure 'limits'"):
            worker.ask({"measure": "limits"})
    log = (tmp_path / "logs" / "worker.log").read_text()
    assert "from Python" in log
    assert "from C" in log


def test_the_bench_is_closed_in_the_end(tmp_path: Path, worker: WorkerProcess) -> None:
    worker.close()
    assert (tmp_path / "logs" / "worker.log").read_text().endswith("closed\n")


def test_an_engine_that_does_not_load_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)made-up: ended with status 1; .*No module named 'not_there'"):
        start(tmp_path, "import not_there")


def test_an_engine_that_dies_at_work_is_told_with_its_status(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match="ended with status 3"):
        worker.ask(decode(500))
    with pytest.raises(WorkerError, match="ended with status 3"):
        worker.ask(decode(0))


def test_a_worker_that_hangs_is_told_and_ended(tmp_path: Path) -> None:
    with start(tmp_path, LIBRARY_PRINTS.replace("return 1.0", "import time; time.sleep(60)"), timeout_s=3) as worker:
        with pytest.raises(WorkerError, match="no answer within 3 s"):
            worker.ask(prefill(2))
        worker.close(patience_s=0.1)


def test_a_worker_ends_with_its_harness_though_it_is_stopped(tmp_path: Path) -> None:
    harness = f"""
import sys, time
from pathlib import Path
from benchmarks.worker_process import WorkerProcess
worker = WorkerProcess("w", [sys.executable, "-c", {LIBRARY_PRINTS!r}], Path({str(tmp_path / "log")!r}))
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", harness], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        os.kill(worker, 0)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _alive(worker):
        assert time.monotonic() < deadline, "the worker outlives its harness"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether the process runs: one that ended may wait for a parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
