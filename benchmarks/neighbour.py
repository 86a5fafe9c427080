"""Busy neighbours: processes that keep cores from the engine that is measured. `python -m benchmarks.neighbour NAME`.

- `spin` is one thread that computes without touching memory, bound to the last core that this process may use.
- `matmul` is two threads, bound to nothing, that multiply matrices with torch in a loop.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from benchmarks.worker import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
READY = "ready\n"
MATMUL_THREADS, MATMUL_SIZE = 2, 1024


class NeighbourError(RuntimeError):
    """A neighbour does not start; the message says which, and why."""


def spin(announce: Callable[[], None]) -> NoReturn:
    """Announces itself, and spins for ever."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    announce()
    while True:
        pass


def matmul(announce: Callable[[], None]) -> NoReturn:
    """Announces itself once torch is loaded, and multiplies for ever."""
    import torch

    torch.set_num_threads(MATMUL_THREADS)
    a_NN = torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    product_NN = a_NN @ a_NN
    announce()
    while True:
        torch.mm(a_NN, a_NN, out=product_NN)


NEIGHBOURS: dict[str, Callable[[Callable[[], None]], NoReturn]] = {"spin": spin, "matmul": matmul}


@contextmanager
def neighbour(name: str) -> Iterator[int]:
    """Such a process beside the block, which gets its process id; it is at work before the block begins.

    Raises:
        NeighbourError: no neighbour has that name, or it ended at once.
    """
    if name not in NEIGHBOURS:
        raise NeighbourError(f"no neighbour is called {name!r}; there are: {', '.join(NEIGHBOURS)}")
    command = [sys.executable, "-m", "benchmarks.neighbour", name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            if process.stdout.readline() != READY:
                raise NeighbourError(f"neighbour {name} does not start:\n{process.stderr.read()}")
            yield process.pid
        finally:
            process.kill()


def main() -> None:
    """Is the neighbour that the command line names."""
    die_with_parent()

    def announce() -> None:
        sys.stdout.write(READY)
        sys.stdout.flush()

    NEIGHBOURS[sys.argv[1]](announce)


if __name__ == "__main__":
    main()
