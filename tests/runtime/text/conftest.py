"""Two small tokenizers, one of each family."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from runtime.text.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat", "Der Zug fährt über die Brücke", "你好世界", "emoji 😀 🇫🇷 done"]


@pytest.fixture(scope="session")
def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool call>", "世界"])
    return backend


@pytest.fixture(scope="session")
def byte_level(byte_level_backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(byte_level_backend)


@pytest.fixture(scope="session")
def sentencepiece_backend() -> tokenizers.Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "▁cat", "s", "at", "é", "ü"]
    vocabulary = {piece: id for id, piece in enumerate(["<unk>", "<s>", *pieces])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(sentencepiece_backend)
