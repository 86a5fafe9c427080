"""An unfinished quantization: parts that are done lie beside the output, so that work that was cut off goes on there.

For `--out DIR` the directory is `.DIR.partial`. It holds `run.json`, which says what the parts are made from, one
safetensors file for each part (a layer, the tables), which has the part's report in its metadata, and `lock`, which
a run holds locked as long as it lives, so that no two runs mix their parts.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quant.directories import make_beside, require_vacant, unmake
from quant.files import read_json, write_json
from quant.tensors import Tensor

RUN_FILE = "run.json"
LOCK_FILE = "lock"
CHECKPOINT = "checkpoint"
REPORT = "report"


class OtherRunError(ValueError):
    """What lies in the partial directory was made from something else than what is to go on."""


def source_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint directory that determine what is made from it."""
    return sorted(file for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".json") and file.is_file())


def file_identity(file: Path) -> list[int]:
    """Size and time of change: a file in which both are alike counts as the same."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def require_same(directory: Path, made_from: Mapping[str, Any]) -> None:
    """Compares what a run is made from with what the unfinished one in `directory` recorded in `RUN_FILE`.

    Raises:
        OtherRunError: the two differ; the message says in what.
    """
    wanted = json.loads(json.dumps(made_from))
    recorded = read_json(directory, RUN_FILE, "remove this directory to start anew")
    differing = sorted(key for key in recorded | wanted if recorded.get(key) != wanted.get(key))
    if differing:
        raise OtherRunError(
            f"{directory} holds parts of a run that differs in: {', '.join(differing)}; go on with what that run was "
            "started with, or remove the directory to start anew"
        )


class PartialRun:
    """The parts of an unfinished run.

    Attributes:
        directory: where they lie.
        checkpoint: the directory that becomes the output.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = directory / CHECKPOINT

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Records all that determines the parts, or compares it with what was recorded.

        Args:
            made_from: what JSON can hold, by names that an error can use.

        Raises:
            OtherRunError: finished parts were made from something else; the message says what differs.
        """
        if self.finished():
            require_same(self.directory, made_from)
        write_json(self.directory / RUN_FILE, made_from)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir()

    def finished(self) -> list[str]:
        """The names of the parts that are done."""
        return sorted(file.stem for file in self.directory.glob("*.safetensors") if _is_whole(file))

    def save(self, part: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Keeps a part that is done."""
        file = self._file(part)
        unfinished = file.with_suffix(".tmp")
        save_file(dict(tensors), unfinished, metadata={REPORT: json.dumps(report)})
        os.replace(unfinished, file)

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the report of a part that is done."""
        opened: Any
        with safe_open(self._file(part), "numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return tensors, json.loads(opened.metadata()[REPORT])

    def _file(self, part: str) -> Path:
        return self.directory / f"{part}.safetensors"


@contextmanager
def partial_run(out: Path, *, resume: bool) -> Iterator[PartialRun]:
    """The run that makes `out`, which appears whole on success. On failure the finished parts stay, and the error has
    a note that says how to go on; where there are none, nothing remains, nor do parents that were made for it.

    Raises:
        FileExistsError: `out` exists and is not an empty directory, or an unfinished run is there and `resume` is not
            set.
        BlockingIOError: another run is making `out` now.
        OSError: no directory can be made there, or it cannot be locked.
    """
    require_vacant(out)
    resolved = out.resolve()
    run = PartialRun(resolved.with_name(f".{resolved.name}.partial"))
    made_parents = [] if run.directory.is_dir() else make_beside(out, run.directory)
    with _locked(run.directory):
        if not resume and run.finished():
            raise FileExistsError(
                f"{run.directory} holds an unfinished run; go on with --resume, or remove the directory to start anew"
            )
        try:
            yield run
            run.checkpoint.rename(resolved)
            shutil.rmtree(run.directory)
        except BaseException as error:
            parts = run.finished()
            if not parts:
                unmake(run.directory, made_parents)
            elif not isinstance(error, OtherRunError):
                error.add_note(
                    f"the finished parts ({len(parts)}) are kept in {run.directory}; go on with --resume, or "
                    "remove the directory to start anew"
                )
            raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a partial directory. The system frees it when the process ends, however it ends."""
    with (directory / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another run is at work in {directory}; wait until it has ended, or name another output directory"
            ) from None
        except OSError as error:
            raise OSError(f"{directory} cannot be locked: {error.strerror}") from error
        yield


def _is_whole(file: Path) -> bool:
    """False for what a crash of the machine has cut short: that part is made again."""
    try:
        with safe_open(file, "numpy"):
            return True
    except (SafetensorError, OSError):
        return False
