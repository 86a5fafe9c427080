"""Streams of token ids on disk: shards of bounded size, read through memory maps as one array.

A shard is raw little-endian ids, uint16 or uint32, and its name says nothing of what is in it: data.json lists the
shards of a stream with their lengths. Every shard but the last has the same length.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.atomic_file import replacing
from trainer.data_sources import DataError


class ShardWriter:
    """Appends ids to shards; a shard appears under its name when it is whole. Used as a context manager.

    Attributes:
        shards: file name and length of each shard that is written, as data.json lists them.
        tokens: ids so far.
    """

    def __init__(self, directory: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self._directory, self._name, self._dtype = directory, name, np.dtype(dtype).newbyteorder("<")
        self._shard_tokens, self._room = shard_tokens, 0
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def append(self, ids: Sequence[int]) -> None:
        """Raises OSError if the disk is full; what is whole stays."""
        rest = np.asarray(ids, self._dtype)
        while rest.size:
            if self._file is None:
                self._begin()
            assert self._file is not None
            piece, rest = rest[: self._room], rest[self._room :]
            self._file.write(piece.tobytes())
            self._room -= piece.size
            self.tokens += piece.size
            self.shards[-1]["tokens"] += piece.size
            if not self._room:
                self._finish()

    def _begin(self) -> None:
        file = f"{self._name}-{len(self.shards):05d}.bin"
        self._file = self._open.enter_context(replacing(self._directory / file))
        self._room = self._shard_tokens
        self.shards.append({"file": file, "tokens": 0})

    def _finish(self) -> None:
        self._file = None
        self._open.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None
        self._open.__exit__(kind, error, trace)


class TokenShards:
    """A stream of ids, read-only: `len(stream)` and `stream[start:stop]`, whatever shards they lie in.

    The maps are opened once; a shard that is deleted later is still read by this process.
    """

    def __init__(self, directory: Path, shards: Sequence[dict[str, Any]], dtype: str) -> None:
        """Raises DataError for a shard that is missing or has another size than recorded."""
        stored = np.dtype(dtype).newbyteorder("<")
        self.files = [str(shard["file"]) for shard in shards]
        for shard in shards:
            _check(directory / shard["file"], shard["tokens"] * stored.itemsize)
        self._maps = [np.memmap(directory / file, dtype=stored, mode="r") for file in self.files]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._maps))
        self._dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, part: slice) -> NDArray[np.unsignedinteger[Any]]:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a token stream is read in order: the step of a slice must be 1")
        pieces = [np.empty(0, self._dtype)]
        for index in self._touched(start, stop):
            before = self._ends[index] - len(self._maps[index])
            pieces.append(self._maps[index][max(start - before, 0) : stop - before])
        return np.concatenate(pieces)

    def files_of(self, start: int, stop: int) -> list[str]:
        """The shards that hold the ids from `start` to before `stop`."""
        return [self.files[index] for index in self._touched(start, stop)]

    def _touched(self, start: int, stop: int) -> range:
        if start >= stop:
            return range(0)
        return range(bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop) + 1)


def _check(file: Path, size: int) -> None:
    advice = "restore it, or start the run again without --resume in another --out"
    if not file.exists():
        raise DataError(f"{file}: this token shard is missing; {advice}")
    if file.stat().st_size != size:
        raise DataError(f"{file}: this token shard has {file.stat().st_size} bytes and should have {size}; {advice}")
