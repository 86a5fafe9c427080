"""How a model is tuned for 4 bits: typed settings."""

from __future__ import annotations

import math
from dataclasses import dataclass


class TuningError(RuntimeError):
    """Tuning cannot go on; the message says at which step, and what to change."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """One tuning run. Learning rates fall linearly to zero, after a short rise.

    Attributes:
        steps: optimizer steps.
        batch_tokens: tokens a step; at least one window.
        window_tokens: the longest window; the model's context where that is shorter.
        micro_batch_tokens: tokens that go through the model at a time, at least one window; bounds memory.
        matrix_lr: Muon's, for the matrices of the blocks. About a fifth of what the model was trained with.
        table_lr: AdamW's, for embedding and head.
        unrounded_share: of the windows of a batch, those that the unrounded weights learn from too (at least one), and
            the weight of what they teach.
        scale_lr: Adam's, for the logarithms of the scales.
        patience: evaluations in a row without a better held-back loss after which tuning stops.
    """

    steps: int
    batch_tokens: int = 4096
    window_tokens: int = 1024
    micro_batch_tokens: int = 2048
    matrix_lr: float = 6e-4
    table_lr: float = 2e-4
    scale_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.03
    unrounded_share: float = 0.25
    gradient_clip: float = 1.0
    patience: int = 3
    seed: int = 0

    @property
    def longest_window(self) -> int:
        """Tokens of a window, unless the model's context is shorter."""
        return min(self.window_tokens, self.batch_tokens)

    @classmethod
    def with_rate(cls, steps: int, matrix_lr: float) -> TuneSettings:
        """With another learning rate of the matrices, and one for the tables that keeps its proportion."""
        return cls(steps, matrix_lr=matrix_lr, table_lr=matrix_lr / 3)

    def __post_init__(self) -> None:
        if not 0 <= self.unrounded_share <= 1:
            raise TuningError(f"unrounded_share must lie between 0 and 1, is {self.unrounded_share}")
        for name in ("steps", "batch_tokens", "window_tokens", "micro_batch_tokens", "patience"):
            if getattr(self, name) < 1:
                raise TuningError(f"{name} must be at least 1, is {getattr(self, name)}")
        for name in ("matrix_lr", "table_lr", "scale_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise TuningError(f"{name} must be a positive number, is {getattr(self, name)}")
