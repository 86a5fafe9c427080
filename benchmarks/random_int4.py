"""Random 4-bit weights, which the peers are given: speed does not depend on what a weight says.

Codes lie in [-7, 7]. The sixteenth, -8, is left out: without it the mean is zero, and activations that run through a
chain of random matrices stay of one size, so that nobody computes with infinities.

Needs numpy and `trainer.config`, and nothing else: it runs in the peers' own environments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer.config import ModelConfig

CODE_STD = math.sqrt(sum(code * code for code in range(-7, 8)) / 15)
"""Standard deviation of a code that is uniform in [-7, 7]."""

LayerMatrix = Literal["q", "k", "v", "o", "gate", "up", "down"]
LAYER_MATRICES: tuple[LayerMatrix, ...] = get_args(LayerMatrix)
SUMMED = {"o": 3, "down": 2}
"""Without attention and SwiGLU, `o` reads the sum of q, k and v, and `down` that of gate and up."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight w_NK, which maps K inputs to N outputs; `summed` inputs of unit variance were added up before it."""

    name: str
    N: int
    K: int
    summed: int = 1

    @property
    def scale(self) -> float:
        """The scale of its codes that gives outputs of unit variance."""
        return 1 / (CODE_STD * math.sqrt(self.K * self.summed))


def layer_matrix(model: ModelConfig, name: LayerMatrix) -> Matrix:
    """A matrix that every layer has."""
    D, F = model.hidden_size, model.intermediate_size
    N, K = {"gate": (F, D), "up": (F, D), "down": (D, F)}.get(name, (D, D))
    return Matrix(name, N, K, SUMMED.get(name, 1))


def head_matrix(model: ModelConfig) -> Matrix:
    """The output head."""
    return Matrix("head", model.vocab_size, model.hidden_size)


def products(model: ModelConfig) -> Iterator[Matrix]:
    """All matrices that a token is multiplied with: seven a layer, then the head."""
    for _ in range(model.num_layers):
        yield from (layer_matrix(model, name) for name in LAYER_MATRICES)
    yield head_matrix(model)


def random_nibbles(rng: np.random.Generator, num_bytes: int, *, zero: int) -> NDArray[np.uint8]:
    """Two random codes a byte.

    Args:
        zero: the nibble that stands for the code 0: 8 in an unsigned form, 0 in two's complement.

    Returns:
        [num_bytes]
    """
    nibbles = (np.arange(-7, 8) + zero) % 16
    pairs = (nibbles[:, None] * 16 + nibbles).astype(np.uint8).ravel()
    drawn: NDArray[np.uint8] = pairs[rng.integers(0, len(pairs), num_bytes, dtype=np.uint8)]
    return drawn
