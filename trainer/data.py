"""From text to tokens on disk, and from there to batches.

A run directory's `data/` holds the tokenizer and two streams of token ids, `train.bin` and `held_out.bin`: documents
one after the other, each starting with the end-of-text token. Batches are windows of the training stream in an order
that depends on the seed and the step only, so the step number is the whole cursor. Beside them stand the documents as
text, for the quantizer: those held out (`held_out.jsonl`), to measure on; those trained on (`train.jsonl`), to tune on;
and some of the latter (`calibration.jsonl`), to calibrate on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.format import read_tokenizer, write_json
from quant.text import read_documents
from trainer.config import TrainConfig
from trainer.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

CALIBRATION_DOCUMENTS = 256


class DataError(ValueError):
    """A corpus that is too small, or not the one that a run began with; the message says which."""


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """The prepared corpus: memory-mapped token ids, and what osp.json says of them."""

    train: NDArray[np.uint16 | np.uint32]
    held_out: NDArray[np.uint16 | np.uint32]
    tokenizer: Tokenizer
    documents: int
    held_out_documents: int

    @property
    def end_token_id(self) -> int:
        """The token that begins and ends documents."""
        return self.tokenizer.get_vocab()[END_OF_TEXT]


def split_documents(documents: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    """(training, held-out) documents in their order. The split follows each document's hash, so that it neither
    depends on the order nor moves a document when others are added; at least one is held out.

    Raises:
        DataError: fewer than two documents.
    """
    if len(documents) < 2:
        raise DataError(
            f"the corpus has {len(documents)} document(s); at least 2 are needed, since whole documents are held out "
            "for validation (a .txt file is one document, a .jsonl file has one a line)"
        )
    ranks = [_rank(text) for text in documents]
    threshold = int(held_out * 2**64)
    below = {rank for rank in ranks if int.from_bytes(rank[:8], "big") < threshold} or {min(ranks)}
    train = [text for text, rank in zip(documents, ranks, strict=True) if rank not in below]
    if not train:
        raise DataError("every document would be held out: the corpus holds the same text again and again")
    return train, [text for text, rank in zip(documents, ranks, strict=True) if rank in below]


def _rank(text: str) -> bytes:
    """A place in an order that has nothing to do with what the text says."""
    return hashlib.sha256(text.encode()).digest()


def write_documents(file: Path, documents: Sequence[str]) -> None:
    """One JSON object with a "text" a line, as `quant.text` reads it."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    file.write_text("".join(lines), encoding="utf-8")


def prepare(
    paths: Sequence[str | os.PathLike[str]], directory: Path, config: TrainConfig, *, resume: bool = False
) -> TokenStreams:
    """Reads the corpus, trains the tokenizer, and writes both and the token streams into `directory`.

    Args:
        resume: open what is there already, after making sure that it was made from this corpus.

    Raises:
        TextError: the corpus cannot be read.
        DataError: it is smaller than one batch; or, to resume, it is another one than before.
    """
    documents = list(read_documents(paths))
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if not resume:
        _write_streams(documents, digest, directory, config)
    summary = json.loads((directory / "data.json").read_text("utf-8"))
    if summary["corpus_sha256"] != digest:
        raise DataError(f"{directory} was made from another text than --data names now; resume with the same text")
    train, held_out = (
        np.memmap(directory / f"{name}.bin", dtype=summary["dtype"], mode="r") for name in ("train", "held_out")
    )
    return TokenStreams(
        train,
        held_out,
        read_tokenizer(directory),
        documents=summary["documents"],
        held_out_documents=summary["held_out_documents"],
    )


def _write_streams(documents: Sequence[str], digest: str, directory: Path, config: TrainConfig) -> None:
    train, held_out = split_documents(documents, config.held_out)
    tokenizer = train_tokenizer(train, config.model.vocab_size)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if config.model.vocab_size <= 2**16 else "uint32"
    for name, part in (("train", train), ("held_out", held_out)):
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(part)]
        ids = np.concatenate([np.asarray(document, dtype) for document in encoded])
        needed = config.batch_tokens + config.model.context_length if name == "train" else 2
        if ids.size < needed:
            raise DataError(
                f"the {name.replace('_', '-')} part of the corpus has {ids.size} tokens in {len(part)} document(s); "
                f"at least {needed} are needed"
            )
        ids.tofile(directory / f"{name}.bin")
    save_tokenizer(tokenizer, directory, config.model.context_length)
    write_documents(directory / "train.jsonl", train)
    write_documents(directory / "held_out.jsonl", held_out)
    write_documents(directory / "calibration.jsonl", sorted(train, key=_rank)[:CALIBRATION_DOCUMENTS])
    summary = {
        "corpus_sha256": digest,
        "dtype": dtype,
        "documents": len(train),
        "held_out_documents": len(held_out),
    }
    write_json(directory / "data.json", summary)


def training_batch(stream: NDArray[np.integer], config: TrainConfig, step: int) -> torch.Tensor:
    """The windows of `step`: int64 [B, L + 1]; inputs are `[:, :-1]`, targets `[:, 1:]`.

    Each epoch visits every window once, in a new order and cut at a new offset.
    """
    length = config.model.context_length
    rows = config.batch_tokens // length
    windows = (len(stream) - length) // length
    chosen = []
    for index in range(step * rows, (step + 1) * rows):
        epoch, position = divmod(index, windows)
        order, offset = _epoch_order(config.seed, epoch, windows, length)
        start = int(order[position]) * length + offset
        chosen.append(stream[start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(chosen))


@lru_cache(maxsize=2)  # a batch spans two epochs at most
def _epoch_order(seed: int, epoch: int, windows: int, length: int) -> tuple[NDArray[np.int64], int]:
    generator = np.random.default_rng([seed, epoch])
    return generator.permutation(windows), int(generator.integers(length))


def held_out_windows(stream: NDArray[np.integer], length: int, tokens: int) -> torch.Tensor:
    """Windows spread evenly over the held-out stream, at most `tokens` tokens, at least one: int64 [B, L + 1]."""
    length = min(length, len(stream) - 1)
    windows = (len(stream) - 1) // length
    count = max(1, min(windows, tokens // length))
    starts = np.arange(count) * windows // count * length
    return torch.from_numpy(np.stack([stream[start : start + length + 1].astype(np.int64) for start in starts]))
