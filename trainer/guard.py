"""What keeps a long run safe: steps that are not finite are skipped, and SIGTERM stops between two steps."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn


class TrainingStoppedError(RuntimeError):
    """Training was asked to stop and did so between two steps; a checkpoint of `step` is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved; go on with --resume")
        self.step = step


@dataclass(slots=True)
class StepGuard:
    """Decides whether a step may change parameters.

    Attributes:
        limit: skipped steps in a row that end the run.
        skipped: skipped steps of the whole run.
        in_a_row: skipped steps since the last good one.
    """

    limit: int
    skipped: int = 0
    in_a_row: int = 0

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        """Whether both are finite; counts the step if not."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that going on makes no sense."""
        return self.in_a_row >= self.limit


def first_bad_parameter(model: nn.Module) -> str:
    """The first parameter that is not finite itself, or else whose gradient is not, in words."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"Parameter {name} itself is not finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"The gradient of {name} is not finite"
    return "Every parameter and every gradient is finite"


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM ends nothing but makes what the block gets return True.

    Signals reach the main thread only: elsewhere nobody asks, and SIGTERM does what it did.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def request(_number: int, _frame: FrameType | None) -> None:
        requested.set()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
