"""The tokenizer of a checkpoint, read in one way for calibration, evaluation and serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quant.files import read_text, sha256
from quant.llama import CheckpointError, LlamaConfig

TOKENIZER_FILE = "tokenizer.json"


def read_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which encodes text whole and as text.

    Truncation and padding, which tokenizer.json may ask for, are off. A special token that is typed in a text is
    characters, not control; those that the post-processor adds (a beginning-of-sequence token) are still added.

    Raises:
        CheckpointError: tokenizer.json is missing or cannot be read.
    """
    text = read_text(root, TOKENIZER_FILE, "copy the tokenizer that the model was trained with there")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises no narrower type
        raise CheckpointError(root, f"{TOKENIZER_FILE} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_tokenizer(root: Path, config: LlamaConfig, provenance: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` unless tokenizer.json is the one recorded and its ids fit the embedding."""
    vocabulary = read_tokenizer(root).get_vocab(with_added_tokens=True)
    recorded, actual = provenance.get("tokenizer_sha256"), sha256(root / TOKENIZER_FILE)
    if recorded is not None and recorded != actual:
        raise CheckpointError(
            root,
            f"{TOKENIZER_FILE} is not the one this model was made with: its SHA-256 is {actual[:12]}…, "
            f"osp.json records {str(recorded)[:12]}…",
        )
    highest = max(vocabulary.values(), default=-1)
    if not 0 <= highest < config.vocab_size:
        raise CheckpointError(
            root, f"{TOKENIZER_FILE} has ids up to {highest}, but the model's vocabulary is {config.vocab_size}"
        )
