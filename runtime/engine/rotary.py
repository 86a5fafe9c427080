"""The frequencies of rotary position embedding (arXiv:2104.09864), the same for every engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.llama import LlamaConfig


def rotary_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """Radians a position of each pair of channels, float32 [C / 2], rounded as in training."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return (config.rope_theta**-exponents).astype(np.float32)
