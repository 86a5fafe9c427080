"""The engine that the HTTP tests serve with: `OSP_TEST_ENGINE`, by default whatever `osp serve` chooses.

`OSP_TEST_ENGINE=onnx pytest tests/runtime/server` runs the same tests against ONNX Runtime, and `vllm` against vLLM, in
an environment that has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import write_4bit

ENGINE = os.environ.get("OSP_TEST_ENGINE", "auto")

# float32, so that log-probabilities can be held against the reference engine's as closely as any other engine's.
# Blocks of 32 tokens, so that prompts of 100 can share some: it has 128 by default on a CPU.
VLLM = ("--vllm.enforce-eager", "--vllm.max-num-seqs=32", "--vllm.dtype=float32", "--vllm.block-size=32")

OPTIONS = ("--engine", ENGINE, *(VLLM if ENGINE == "vllm" else ()))
"""How `osp serve` is told."""

DIFFERENCES = {
    "vllm": {
        "test_a_temperature_close_to_0_takes_the_likeliest_token": "refused: vLLM would compute with 0.01",
        "test_the_form_ends_though_end_tokens_are_ignored": "refused: past its end a form allows any token in vLLM",
        "test_a_form_that_becomes_too_much_on_the_way_is_the_requests_own_fault": "vLLM sets grammars no limit of work",
    },
    "onnx": {"test_cached_tokens_are_told": "a slot belongs to one sequence: there is no prefix cache"},
}
"""By engine, the tests of the HTTP suite that fail with it, and why; docs/vllm.md and docs/onnx.md explain."""

START_S = 60 if ENGINE != "vllm" else 600
"""How long it may take to load a tiny model."""


def write_model(root: Path, write_tokenizer: Callable[[Path, int], None], end: str, **shape: Any) -> Path:
    """A checkpoint in W4A4 that the engine can run: vLLM has heads of some widths only.

    Args:
        end: the end token.
        shape: goes into config.json.
    """
    if ENGINE != "vllm":
        return write_4bit(root, write_tokenizer=write_tokenizer, **shape)
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    write_4bit(root, write_tokenizer=write_tokenizer, **wide, **shape)
    # Without it transformers chooses a class by the model's type, and that one has tokens of its own.
    (root / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    )
    return root
