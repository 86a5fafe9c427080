"""Two tiny models."""

from __future__ import annotations

import ml_dtypes
import pytest
from checkpoints import write_4bit, write_full_precision

from quant.format import Checkpoint, read_checkpoint


@pytest.fixture(scope="session")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random bfloat16 Llama: 2 layers, width 32, 97 tokens, context 64."""
    return read_checkpoint(write_full_precision(tmp_path_factory.mktemp("models") / "bfloat16", ml_dtypes.bfloat16))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same in W4A4."""
    return read_checkpoint(write_4bit(tmp_path_factory.mktemp("models") / "w4a4"))
