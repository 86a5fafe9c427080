"""From text to tokens on disk, and from there to batches.

A run directory's `data/` holds

    tokenizer.json      the tokenizer, and what transformers needs beside it
    train-N.bin         shards of token ids: documents one after the other, each starting with the end-of-text token
    held_out-N.bin      the same of the documents that training never sees
    *.jsonl             the documents as text, for the quantizer: held_out to measure on, train to tune on, calibration,
                        some of the latter, to calibrate on
    data.json           written last: what the corpus was and what was made of it

Batches are windows of the training stream in an order that depends on the seed and the step only, so the step number
is the whole cursor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.format import read_tokenizer
from trainer.atomic_file import replace_json
from trainer.config import ConfigError, TrainConfig
from trainer.data_shards import ShardWriter, TokenShards
from trainer.data_sources import DataError, Source, differences, find_sources
from trainer.data_split import (
    calibration_documents,
    source_documents,
    split_documents,
    tokenizer_sample,
    write_documents,
    written_documents,
)
from trainer.tokenizer import END_OF_TEXT, reuse_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "DataError", "TokenStreams", "held_out_windows", "prepare", "training_batch", "window_starts", "write_documents",
]  # fmt: skip

DATA_FORMAT = 2
SHARD_TOKENS = 2**27
"""Tokens in a shard: 256 MiB for vocabularies up to 65,536."""

ENCODED_TOGETHER = 64
"""Documents that the tokenizer encodes at a time, in parallel."""


class Tokens(Protocol):
    """A stream of token ids: an array, or shards that read like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """The prepared corpus: memory-mapped token ids, and what osp.json says of them."""

    train: TokenShards
    held_out: TokenShards
    tokenizer: Tokenizer
    documents: int
    held_out_documents: int

    @property
    def end_token_id(self) -> int:
        """The token that begins and ends documents."""
        return self.tokenizer.get_vocab()[END_OF_TEXT]


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    directory: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    tokenizer: Path | None = None,
) -> TokenStreams:
    """Reads the corpus, trains the tokenizer, and writes both and the token shards into `directory`.

    Args:
        paths: see `data_sources`.
        resume: open what is there already, after making sure that it was made from this corpus. That reads the names,
            sizes and times of its files, and what is in those whose time has changed.
        tokenizer: a directory with a tokenizer.json to use instead of training one.

    Raises:
        TextError: the corpus cannot be read.
        DataError: it is smaller than one batch, or the tokenizer does not fit the model; to resume: the corpus or the
            tokenizer is another one than before, or a shard is missing.
        OSError: the disk is full.
    """
    sources = find_sources(paths)
    reused = reuse_tokenizer(tokenizer, config.model.vocab_size) if tokenizer else None
    if not resume:
        _write(sources, directory, config, reused)
    summary = _summary(directory, config)
    if changes := differences(summary["corpus"], sources):
        raise DataError(
            f"{directory} was made from another text than --data names now: {'; '.join(changes[:5])}. Resume with the "
            "same text, or start a new run in another --out"
        )
    used = read_tokenizer(directory)
    if reused is not None and _digest(reused) != _digest(used):
        raise DataError(f"{directory} was made with another tokenizer than that of {tokenizer}; resume without it")
    return TokenStreams(
        TokenShards(directory, summary["train"], summary["dtype"]),
        TokenShards(directory, summary["held_out"], summary["dtype"]),
        used,
        documents=summary["documents"],
        held_out_documents=summary["held_out_documents"],
    )


def _summary(directory: Path, config: TrainConfig) -> dict[str, Any]:
    try:
        summary = json.loads((directory / "data.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{directory}: data.json cannot be read ({error}); start a new run in another --out") from None
    if summary.get("format") != DATA_FORMAT:
        raise DataError(f"{directory} was written by another version of this program; start a new run in another --out")
    if summary["vocab_size"] != config.model.vocab_size:
        raise DataError(
            f"{directory} was made for a vocabulary of {summary['vocab_size']} tokens, the model has one of "
            f"{config.model.vocab_size}; resume with the preset that the run began with"
        )
    return dict(summary)


def _write(sources: Sequence[Source], directory: Path, config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for left in (directory / "data.json", *directory.glob("*.bin"), *directory.glob("*.partial")):
        left.unlink(missing_ok=True)
    corpus = [source.entry() for source in sources]
    split = split_documents(source_documents(sources), directory, config.held_out)
    if tokenizer is None:
        sample = tokenizer_sample(directory / "train.jsonl", split.bytes)
        tokenizer = train_tokenizer(sample, config.model.vocab_size)
    save_tokenizer(tokenizer, directory, config.model.context_length)
    dtype = "uint16" if config.model.vocab_size <= 2**16 else "uint32"
    needed = {"train": config.batch_tokens + config.model.context_length, "held_out": 2}
    counts = {"train": split.documents, "held_out": split.held_out_documents}
    shards = {}
    for name, least in needed.items():
        with ShardWriter(directory, name, dtype, SHARD_TOKENS) as writer:
            for ids in _encoded(written_documents(directory / f"{name}.jsonl"), tokenizer):
                writer.append(ids)
        if writer.tokens < least:
            raise DataError(
                f"the {name.replace('_', '-')} part of the corpus has {writer.tokens} tokens in {counts[name]} "
                f"document(s); at least {least} are needed"
            )
        shards[name] = writer.shards
    write_documents(directory / "calibration.jsonl", calibration_documents(directory / "train.jsonl"))
    made = {key: value for key, value in asdict(split).items() if key != "bytes"}
    vocabulary = {"vocab_size": config.model.vocab_size, "dtype": dtype}
    replace_json(directory / "data.json", {"format": DATA_FORMAT, **made, **vocabulary, "corpus": corpus, **shards})


def _encoded(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    while chunk := list(islice(documents, ENCODED_TOGETHER)):
        for encoding in tokenizer.encode_batch(chunk):
            yield encoding.ids


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def training_batch(stream: Tokens, config: TrainConfig, step: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    """The windows of `step`: int64 [B, L + 1]; inputs are `[:, :-1]`, targets `[:, 1:]`.

    Each epoch visits every window once, in a new order and cut at a new offset. A document longer than a window goes
    on in another; a window may hold several, each beginning with the end-of-text token.

    Args:
        rank, world_size: of `world_size` processes that share a batch, the rows of number `rank`, in order.

    Raises:
        ConfigError: the rows of a batch cannot be shared equally.
    """
    length = config.model.context_length
    starts = window_starts(len(stream), config, step, rank, world_size)
    return _windows(stream, starts, length)


def window_starts(tokens: int, config: TrainConfig, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Where the windows of `training_batch` begin in a stream of so many tokens."""
    length = config.model.context_length
    rows, over = divmod(config.batch_tokens // length, world_size)
    if over:
        raise ConfigError(
            f"a batch of {config.batch_tokens // length} rows cannot be shared by {world_size} processes equally"
        )
    windows = (tokens - length) // length
    first = (step * world_size + rank) * rows
    starts = []
    for index in range(first, first + rows):
        epoch, position = divmod(index, windows)
        order, offset = _epoch_order(config.seed, epoch, windows, length)
        starts.append(int(order[position]) * length + offset)
    return starts


@lru_cache(maxsize=2)  # a batch spans two epochs at most
def _epoch_order(seed: int, epoch: int, windows: int, length: int) -> tuple[NDArray[np.int64], int]:
    generator = np.random.default_rng([seed, epoch])
    return generator.permutation(windows), int(generator.integers(length))


def held_out_windows(stream: Tokens, length: int, tokens: int) -> torch.Tensor:
    """Windows spread evenly over the held-out stream, at most `tokens` tokens, at least one: int64 [B, L + 1]."""
    length = min(length, len(stream) - 1)
    windows = (len(stream) - 1) // length
    count = max(1, min(windows, tokens // length))
    starts = np.arange(count) * windows // count * length
    return _windows(stream, starts.tolist(), length)


def _windows(stream: Tokens, starts: Iterable[int], length: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([stream[start : start + length + 1].astype(np.int64) for start in starts]))
