"""Divides a corpus into documents to train on and documents to hold out, as JSON lines on disk.

Documents pass through one at a time, so that a corpus may be larger than memory; only those chosen for calibration are
kept together.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quant.text import TextError, json_lines
from trainer.atomic_file import replacing
from trainer.data_sources import DataError, Source

CALIBRATION_DOCUMENTS = 256
SAMPLE_BYTES = 2**28
"""Text that a tokenizer is trained on, at most, in UTF-8 bytes."""


@dataclass(slots=True)
class Split:
    """What `split_documents` wrote. Documents of white space only are in neither part, and counted as `empty`."""

    documents: int = 0
    held_out_documents: int = 0
    empty_documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents to train on."""


def source_documents(sources: Sequence[Source]) -> Iterator[str]:
    """The documents of all sources in turn, those of white space too; TextError at the end if there are no others."""
    blank = True
    for source in sources:
        for text in source.documents():
            blank = blank and not text.strip()
            yield text
    if blank:
        raise TextError(f"no text in {', '.join(source.name for source in sources) or 'an empty list of paths'}")


def written_documents(file: Path) -> Iterator[str]:
    """The documents of a JSON lines file that `write_documents` or `split_documents` wrote."""
    for _, record in json_lines(file):
        yield record["text"]


def write_documents(file: Path, documents: Iterable[str]) -> None:
    """One JSON object with a "text" a line, as `quant.text` reads it."""
    with replacing(file) as out:
        for text in documents:
            out.write(_line(text))


def split_documents(documents: Iterable[str], directory: Path, held_out: float) -> Split:
    """Writes `train.jsonl` and `held_out.jsonl`, each in the order of `documents`.

    The split follows each document's hash, so that it neither depends on the order nor moves a document when others
    are added. At least one document is held out: where the hash of none is below `held_out`, the lowest.

    Raises:
        DataError: fewer than two documents, or every one would be held out.
    """
    split, threshold, lowest = Split(), int(held_out * 2**64), b"\xff" * 32
    with ExitStack() as files:
        train = files.enter_context(replacing(directory / "train.jsonl"))
        kept_back = files.enter_context(replacing(directory / "held_out.jsonl"))
        for text in documents:
            if not text.strip():
                split.empty_documents += 1
                continue
            rank = _rank(text)
            lowest = min(lowest, rank)
            if int.from_bytes(rank[:8], "big") < threshold:
                split.held_out_documents += 1
                kept_back.write(_line(text))
            else:
                split.documents += 1
                split.bytes += len(text.encode())
                train.write(_line(text))
    _require_two(split)
    if not split.held_out_documents:
        _hold_out(lowest, directory, split)
    if not split.documents:
        raise DataError("every document would be held out: the corpus holds the same text again and again")
    return split


def _require_two(split: Split) -> None:
    if split.documents + split.held_out_documents < 2:
        raise DataError(
            f"the corpus has {split.documents + split.held_out_documents} document(s); at least 2 are needed, since "
            "whole documents are held out for validation (a .txt file is one document, a .jsonl file has one a line)"
        )


def _hold_out(rank: bytes, directory: Path, split: Split) -> None:
    """Moves the documents of this rank, one unless the corpus repeats itself, to the other side."""
    moved: list[str] = []
    with replacing(directory / "train.jsonl") as train:
        for text in written_documents(directory / "train.jsonl"):
            if _rank(text) == rank:
                moved.append(text)
            else:
                train.write(_line(text))
    write_documents(directory / "held_out.jsonl", moved)
    split.documents -= len(moved)
    split.held_out_documents += len(moved)
    split.bytes -= sum(len(text.encode()) for text in moved)


def calibration_documents(train: Path) -> list[str]:
    """Some documents of `train`, which do not depend on their order: those whose hashes are lowest."""
    return heapq.nsmallest(CALIBRATION_DOCUMENTS, written_documents(train), key=_rank)


def tokenizer_sample(train: Path, size: int, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """The documents of `train`, which has `size` bytes of text; about `limit` bytes of them where it has more."""
    # Bytes 8 to 16 of the hash: bytes 0 to 8 decided on which side the document is.
    threshold = 2**64 * limit // max(size, 1)
    for text in written_documents(train):
        if size <= limit or int.from_bytes(_rank(text)[8:16], "big") < threshold:
            yield text


def _rank(text: str) -> bytes:
    """A place in an order that has nothing to do with what the text says."""
    return hashlib.sha256(text.encode()).digest()


def _line(text: str) -> bytes:
    return (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode()
