"""A byte-level BPE tokenizer, trained on the corpus or taken from another model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from quant.format import read_tokenizer, write_json
from trainer.config import ConfigError

END_OF_TEXT = "<|endoftext|>"
"""Stands before every document, and so also ends the one before it: begin and end token in one."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries; id 0 is `END_OF_TEXT`, which encoding puts in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    _put_end_first(tokenizer)
    # Where a document spells the token out, that is text, as it is to the server.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """Writes tokenizer.json and what `transformers.AutoTokenizer` needs beside it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", settings)


def reuse_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of another model, made to put `END_OF_TEXT`, which it must know, before every document.

    Raises:
        ConfigError: it lacks that token, or has ids that a vocabulary of `vocab_size` does not.
        CheckpointError: `directory` holds no tokenizer.json that can be read.
    """
    tokenizer = read_tokenizer(directory)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if END_OF_TEXT not in vocabulary:
        raise ConfigError(f"{directory}: the tokenizer has no {END_OF_TEXT} token, which begins every document")
    if max(vocabulary.values()) >= vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has ids up to {max(vocabulary.values())}, but the preset's vocabulary has "
            f"{vocab_size}; choose a preset with a larger one, or a smaller tokenizer"
        )
    _put_end_first(tokenizer)
    return tokenizer


def _put_end_first(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
