"""From a name on the command line to an engine that runs a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from quant.format import read_checkpoint
from runtime.engine.base import Engine, ModelRunner
from runtime.engine.local import LocalEngine
from runtime.engine.reference import ReferenceRunner
from runtime.engine.scheduler import SchedulerLimits

log = logging.getLogger(__name__)

ENGINES = ("auto", "reference")
"""The names that `load_engine` knows; `auto` chooses among the others."""


class UnknownEngineError(ValueError):
    """This release has no engine of that name for what is asked of it; the message lists those it has."""

    def __init__(self, name: str, known: Sequence[str] = ENGINES) -> None:
        super().__init__(f"this release has no engine {name!r}; it has: {', '.join(known)}")


def load_engine(name: str, path: Path, limits: SchedulerLimits | None = None) -> Engine:
    """Starts the engine called `name` on the checkpoint directory `path`.

    Raises:
        UnknownEngineError: no such engine; raised before anything is read.
        CheckpointError: `path` is not a usable checkpoint.
    """
    return LocalEngine(load_runner(name, path), limits)


def load_runner(name: str, path: Path) -> ModelRunner:
    """The bare `ModelRunner` of the engine called `name`, for work without a scheduler; errors as `load_engine`."""
    if name not in ENGINES:
        raise UnknownEngineError(name)
    checkpoint = read_checkpoint(path)
    if name == "auto":
        log.info("engine auto: reference runs %s, it being the only engine of this release", path)
    return ReferenceRunner(checkpoint)
