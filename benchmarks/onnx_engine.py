"""ONNX Runtime beside the native engine: the same checkpoint, the same steps, in turns.

    python -m benchmarks.onnx_engine --model demo --threads 2 --rounds 5

Whole steps of the runners, greedy tokens included: one sequence and eight that decode, and a prompt. Memory is that
of a process of its own for each engine, once it has run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import click
import numpy as np

from runtime.engine.registry import EngineOptions, load_runner
from runtime.engine.runner import ModelRunner, SequenceSlice
from runtime.model_store import resolve_model

ENGINES = ("onnx", "native")
DECODE_STEPS = 16

MEMORY = """
import sys
from pathlib import Path
from benchmarks.onnx_engine import Work
from runtime.engine.registry import load_runner
work = Work(load_runner(sys.argv[1], Path(sys.argv[2])), int(sys.argv[3]))
work.prefill()
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
"""


class Work:
    """What is measured of a runner. Every sequence has blocks for `positions` positions."""

    def __init__(self, runner: ModelRunner, positions: int) -> None:
        self._runner, self._positions = runner, positions
        self._blocks = -(-(positions + DECODE_STEPS) // runner.block_size)

    def prefill(self) -> int:
        """A prompt of `positions` tokens, at most 512 of them at a time; returns the tokens."""
        ids_L = np.arange(self._positions, dtype=np.int32) % self._runner.info.vocab_size
        for start in range(0, self._positions, 512):
            piece = ids_L[start : start + 512]
            self._runner.step([SequenceSlice(piece, start, self._table(0), 1)]).argmax()
        return self._positions

    def decode(self, sequences: int) -> int:
        """Some tokens of each of so many sequences, after `positions` tokens; returns the tokens."""
        ids_N = np.arange(sequences, dtype=np.int32)
        for step in range(DECODE_STEPS):
            position = self._positions + step
            rows = [SequenceSlice(ids_N[i : i + 1], position, self._table(i), 1) for i in range(sequences)]
            ids_N = np.maximum(self._runner.step(rows).argmax(), 0)
        return sequences * DECODE_STEPS

    def _table(self, sequence: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.arange(sequence * self._blocks, (sequence + 1) * self._blocks, dtype=np.int32)


def rate(task: Callable[[Work], int], work: Work) -> float:
    """Tokens a second, over half a second at least."""
    began, tokens = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 0.5:
        tokens += task(work)
    return tokens / seconds


def resident_megabytes(engine: str, path: Path, positions: int) -> float:
    """Resident memory of a process that has loaded the model and computed a prompt."""
    command: Sequence[str] = [sys.executable, "-c", MEMORY, engine, str(path), str(positions)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


@click.command()
@click.option("--model", default="demo", show_default=True, help="A directory or a bundled name.")
@click.option("--threads", default=2, show_default=True)
@click.option("--positions", default=256, show_default=True, help="Length of the prompt.")
@click.option("--rounds", default=5, show_default=True, help="Of each figure, the median.")
def main(model: str, threads: int, positions: int, rounds: int) -> None:
    """Measure, and print a table in Markdown: ONNX Runtime, the native engine, and the median of the ratios."""
    path = resolve_model(model)
    works, seconds = {}, {}
    for engine in ENGINES:
        began = time.perf_counter()
        works[engine] = Work(load_runner(engine, path, EngineOptions(threads=threads)), positions)
        seconds[engine] = time.perf_counter() - began
    click.echo("| | onnx | native | ratio |\n|---|---|---|---|")
    click.echo(f"| loads in, s | {seconds['onnx']:.2f} | {seconds['native']:.2f} | |")
    memory = [resident_megabytes(engine, path, positions) for engine in ENGINES]
    click.echo(f"| resident memory, MB | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |")
    tasks: dict[str, Callable[[Work], int]] = {
        "prefill, tokens/s": Work.prefill,
        "decode, 1 sequence, tokens/s": lambda work: work.decode(1),
        "decode, 8 sequences, tokens/s": lambda work: work.decode(8),
    }
    for name, task in tasks.items():
        rates = [[rate(task, works[engine]) for engine in ENGINES] for _ in range(rounds)]
        medians = [median(column) for column in zip(*rates, strict=True)]
        ratio = median(onnx / native for onnx, native in rates)
        click.echo(f"| {name} | {medians[0]:,.0f} | {medians[1]:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
