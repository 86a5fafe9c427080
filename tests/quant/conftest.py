"""Tiny Hugging Face Llama checkpoints, made by transformers itself, with a tokenizer of one token a byte."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from quant.model import build_block

TEXT = "The quick brown fox jumps over the lazy dog. " * 8

MakeCheckpoint = Callable[..., Path]

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 24,
    "intermediate_size": 41,  # odd, so that the last byte of a packed row is half empty
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass
class BlockCounter:
    """Counts the blocks that are built, and how many of them are in memory at once, at most."""

    built: list[weakref.ref[Any]] = field(default_factory=list)
    most: int = 0

    def __call__(self, *arguments: Any) -> Any:
        """Stands in for `build_block`."""
        self.most = max(self.most, 1 + sum(reference() is not None for reference in self.built))
        block = build_block(*arguments)
        self.built.append(weakref.ref(block))
        return block


@pytest.fixture
def count_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BlockCounter]:
    """`count_blocks(module, …)` counts the blocks that these modules build."""

    def count(*modules: Any) -> BlockCounter:
        counter = BlockCounter()
        for module in modules:
            monkeypatch.setattr(module, "build_block", counter)
        return counter

    return count


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: token ids are those of the 256 bytes, in the order of their letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """`make_checkpoint(name="source", dtype=torch.bfloat16, max_shard_size=None, **shape)` -> its directory."""

    def make(
        name: str = "source", dtype: torch.dtype = torch.bfloat16, max_shard_size: str | None = None, **shape: Any
    ) -> Path:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape}))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)  # the default of 0.02 leaves all logits alike
        path = tmp_path / name
        model.to(dtype).save_pretrained(path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
        byte_tokenizer().save(str(path / "tokenizer.json"))
        return path

    return make


@pytest.fixture
def checkpoint_path(make_checkpoint: MakeCheckpoint) -> Path:
    """A bfloat16 checkpoint with its own head, two query heads a key head, and odd widths."""
    return make_checkpoint()


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """`edit_config(path, key=value)` changes fields of config.json."""

    def edit(path: Path, **fields: Any) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file
