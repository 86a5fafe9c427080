"""The engine that the HTTP tests serve with: `OSP_TEST_ENGINE`, by default whatever `osp serve` chooses.

`OSP_TEST_ENGINE=vllm pytest tests/runtime/server` runs the same tests against vLLM, in an environment that has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
from checkpoints import write_4bit, write_full_precision

ENGINE = os.environ.get("OSP_TEST_ENGINE", "auto")

OPTIONS = ("--engine", ENGINE, *(("--vllm.enforce-eager", "--vllm.max-num-seqs=32") if ENGINE == "vllm" else ()))
"""How `osp serve` is told."""

START_S = 60 if ENGINE != "vllm" else 240
"""How long it may take to load a tiny model."""


def write_model(root: Path, write_tokenizer: Callable[[Path, int], None], end: str, **shape: Any) -> Path:
    """A checkpoint that the engine can run, in W4A4; for vLLM in bfloat16, with heads of a width that it has.

    Args:
        end: the end token.
        shape: goes into config.json.
    """
    if ENGINE != "vllm":
        return write_4bit(root, write_tokenizer=write_tokenizer, **shape)
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    write_full_precision(root, ml_dtypes.bfloat16, **wide, **shape)
    write_tokenizer(root, shape["vocab_size"])
    # Without it transformers chooses a class by the model's type, and that one has tokens of its own.
    (root / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    )
    return root
