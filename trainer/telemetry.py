"""What a run tells of itself while it trains.

    metrics.jsonl     a line every few steps: loss, tokens/s, and the last evaluation in short
    outliers.jsonl    a line an evaluation: excess kurtosis and absmax of every site and layer (`outliers.py`)
    tensorboard/      both as scalars, if wanted

A run that goes on from a checkpoint goes on with them too: what a killed run wrote after that checkpoint is dropped.
In a run of several processes, only process 0 tells.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer import distributed
from trainer.atomic_file import replacing
from trainer.config import ConfigError
from trainer.evaluation import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE, OUTLIERS_FILE, BOARD_DIRECTORY = "metrics.jsonl", "outliers.jsonl", "tensorboard"


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The open logs of a run; `telemetry` opens them."""

    metrics: TextIO
    outliers: TextIO
    board: SummaryWriter | None

    def trained(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a training step."""
        _write(self.metrics, {"step": step, **values})
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"training/{name}", value, step)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Logs the outliers of an evaluation after so many steps."""
        _write(self.outliers, {"step": step, **evaluation.outliers_as_dict()})
        if self.board:
            for tag, value in _scalars(evaluation):
                self.board.add_scalar(tag, value, step)
            self.board.flush()


@contextmanager
def telemetry(directory: Path, step: int, *, tensorboard: bool = False) -> Iterator[Telemetry]:
    """The logs of the run in `directory`, which has finished `step` steps.

    Raises:
        ConfigError: see `summary_writer_type`.
    """
    with ExitStack() as files:
        metrics, outliers = (
            files.enter_context(_log(directory / name, step)) for name in (METRICS_FILE, OUTLIERS_FILE)
        )
        board = None
        if tensorboard and distributed.rank() == 0:
            # TensorBoard overlooks what an earlier process wrote from step `purge_step` on.
            board = summary_writer_type()(str(directory / BOARD_DIRECTORY), purge_step=step + 1)
            files.callback(board.close)
        yield Telemetry(metrics, outliers, board)


def summary_writer_type() -> type[SummaryWriter]:
    """torch's writer of TensorBoard's files.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard, which is missing: pip install 'osp-runtime[tensorboard]'"
        ) from error
    return SummaryWriter


def _log(file: Path, step: int) -> TextIO:
    """A file of JSON lines to append to, without those of steps beyond `step` and what a killed run left unfinished."""
    if distributed.rank() > 0:
        return open(os.devnull, "w", encoding="utf-8")
    if file.exists():
        lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        with replacing(file) as kept:
            kept.writelines(line for line in lines if json.loads(line)["step"] <= step)
    return file.open("a", encoding="utf-8")


def _write(log: TextIO, line: Mapping[str, Any]) -> None:
    log.write(json.dumps(_finite(line)) + "\n")
    log.flush()


def _finite(value: Any) -> Any:
    """`value` with None for numbers that are not finite: JSON has none such."""
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """TensorBoard shows what stands before the first slash as a group."""
    for view, sites in evaluation.outliers.items():
        for site, of in sites.items():
            yield f"excess_kurtosis_{view}/{site}", of.mean_kurtosis
            yield f"absmax_{view}/{site}", of.largest
            for layer, (kurtosis, absmax) in enumerate(zip(of.excess_kurtosis, of.absmax, strict=True)):
                yield f"excess_kurtosis_{view}_{site}/layer_{layer:02d}", kurtosis
                yield f"absmax_{view}_{site}/layer_{layer:02d}", absmax
