"""A run's checkpoints on disk: written whole or not at all, the newest few and the best one kept.

A checkpoint is one file, `checkpoints/step-N.pt`: settings, step (which is the data cursor), parameters, optimizer
state, the state of every random generator, and which step was best so far. `best.json` beside them names the file with
the lowest held-out loss.
"""

from __future__ import annotations

import errno
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.atomic_file import replacing
from trainer.config import CHANGEABLE, ConfigError, TrainConfig, changed_settings


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is safe."""


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((directory / "checkpoints").glob("step-*.pt"))


def checkpoint_file(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / "checkpoints" / f"step-{step:08d}.pt"


def write_checkpoint(directory: Path, state: Mapping[str, Any]) -> Path:
    """Writes `state`, which has a "step", beside the run's other checkpoints, and returns the file.

    Raises:
        TrainingError: the disk is full or refuses; the checkpoints that were there are as they were.
    """
    file = checkpoint_file(directory, state["step"])
    try:
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as out:
            torch.save(dict(state), out)
    except (OSError, RuntimeError) as error:  # torch turns an OSError within torch.save into a RuntimeError
        whole = checkpoints(directory)
        raise TrainingError(
            f"the checkpoint of step {state['step']} could not be written ({_reason(error)}); "
            + (
                f"{whole[-1]} is whole: make room and --resume"
                if whole
                else "there is no other: make room and start again"
            )
        ) from error
    return file


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.strerror or errno.errorcode[cause.errno]
        cause = cause.__cause__ or cause.__context__
    return str(error)


def drop_old(directory: Path, keep: int, best_step: int | None) -> None:
    """Removes all checkpoints but the newest `keep` and the one of `best_step`."""
    best = None if best_step is None else checkpoint_file(directory, best_step)
    for old in checkpoints(directory)[:-keep]:
        if old != best:
            old.unlink()


def read_checkpoint(file: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in `file`.

    Raises:
        TrainingError: the file is damaged.
        ConfigError: it was made with other settings, but for those that are `CHANGEABLE`; the message names them.
    """
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise TrainingError(f"{file} is damaged ({error}); remove it to resume from the one before") from None
    if changed := changed_settings(state["config"], config.to_dict(), ignored=CHANGEABLE):
        raise ConfigError(
            f"{file} was made with other settings ({'; '.join(changed)}); give the same settings to resume"
        )
    return dict(state)


def seed_generators(seed: int) -> None:
    """Sets torch's, numpy's and Python's global generators, so that all of a run's random numbers follow its seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of torch's, numpy's and Python's global generators, of things that `torch.load` takes for safe."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` returned; generators of devices that are not here are left alone."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
    random.setstate(state["python"])
