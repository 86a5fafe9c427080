"""What is left of vLLM's processes when the server that started them is killed. Runs where vLLM is installed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from runtime.loadtest.server_process import ServerProcess

pytest.importorskip("vllm", reason="vLLM is not installed here; docs/vllm.md says how")
psutil = pytest.importorskip("psutil")  # vLLM brings it

LEAVE_S = 10
ARGUMENTS = ("--engine", "vllm", "--vllm.enforce-eager", "--vllm.max-num-seqs=4", "--stall-timeout", "600")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The last test that uses it kills it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with ServerProcess("demo", ARGUMENTS) as running:
            yield running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def test_the_memory_of_a_server_is_that_of_all_its_processes(server: ServerProcess) -> None:
    tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    resident_MB = sum(process.memory_info().rss for process in tree) / 1e6
    measured = server.peak_rss_MB()
    assert measured is not None
    assert len(tree) > 2
    assert resident_MB <= measured < 2 * resident_MB


def test_no_process_outlives_a_killed_server(server: ServerProcess) -> None:
    left = psutil.Process(server.pid).children(recursive=True)
    titles = [" ".join(process.cmdline()) for process in left]
    assert any("EngineCore" in title for title in titles), titles
    assert any("Worker" in title for title in titles), titles

    os.kill(server.pid, signal.SIGKILL)  # only the server, not its process group
    killed = time.monotonic()
    _, left = psutil.wait_procs(left, timeout=LEAVE_S)

    assert left == []
    assert time.monotonic() - killed < LEAVE_S
