"""Where text comes from: files, directories, and datasets of the Hugging Face hub, read one document at a time.

| `--data` | documents |
|---|---|
| FILE.txt, FILE.md | one |
| FILE.jsonl | one a line: an object with a "text" |
| FILE.parquet | one a row of the column "text"; needs pyarrow |
| DIRECTORY | those of the files in it, at any depth, in sorted order |
| hf:NAME[:CONFIG][@SPLIT] | one a row of the column "text"; needs datasets; the split is `train` unless named |

What was read is recorded, so that a run that is resumed can tell whether its corpus is still the same without reading
it: a file whose size and time of modification are the recorded ones is taken to be unchanged, any other is hashed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quant.format import sha256
from quant.text import SUFFIXES as TEXT_SUFFIXES
from quant.text import TextError, file_documents, text_field, text_files

SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
PARQUET_ROWS = 256
"""Rows that are decoded at a time."""

_DATASET = re.compile(r"hf:(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")


class DataError(ValueError):
    """A corpus that cannot be used, or is not the one that a run began with; the message says which and why."""


class Source(Protocol):
    """One part of a corpus."""

    @property
    def name(self) -> str:
        """What it is called in the record."""

    def documents(self) -> Iterator[str]:
        """Its documents in a fixed order, without keeping any.

        Raises, while iterating:
            TextError: it cannot be read; the message names the place.
            DataError: reading it needs a package that is not installed.
        """

    def entry(self) -> dict[str, Any]:
        """What is recorded of it."""

    def difference(self, entry: dict[str, Any]) -> str | None:
        """What has changed since `entry` was recorded; None if nothing has."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file. `name` is its path below the directory that was named, or its file name: a corpus may be moved."""

    path: Path
    name: str

    def documents(self) -> Iterator[str]:
        read = _parquet_documents if self.path.suffix == ".parquet" else file_documents
        yield from read(self.path)

    def entry(self) -> dict[str, Any]:
        status = self.path.stat()
        digest = sha256(self.path)
        return {"file": self.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}

    def difference(self, entry: dict[str, Any]) -> str | None:
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"]):
            return None
        if status.st_size == entry["bytes"] and sha256(self.path) == entry["sha256"]:
            return None
        return f"{self.path} has changed"


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """A dataset of the hub, or a local directory that `datasets` reads; streamed, never downloaded whole."""

    name: str
    """As it was spelled: hf:NAME[:CONFIG][@SPLIT]."""

    def documents(self) -> Iterator[str]:
        datasets = _optional("datasets", self.name)
        hub_name, config, split = self._parts()
        try:
            rows = datasets.load_dataset(hub_name, config, split=split, streaming=True)
            for number, row in enumerate(rows, start=1):
                yield text_field(f"{self.name}: row {number}", row, "text")
        except TextError:
            raise
        except (OSError, ValueError) as error:  # what datasets raises for unknown names, configurations and splits
            raise TextError(f"{self.name}: cannot be read ({error})") from None

    def entry(self) -> dict[str, Any]:
        self._parts()  # a mistake in the spelling shows before anything is written
        return {"dataset": self.name}

    def difference(self, entry: dict[str, Any]) -> str | None:
        # Its rows lie in the token shards; where the hub has moved on meanwhile, the run has not.
        return None if entry.get("dataset") == self.name else f"{self.name} was not part of it"

    def _parts(self) -> tuple[str, str | None, str]:
        match = _DATASET.fullmatch(self.name)
        if match is None:
            raise DataError(f"{self.name}: not of the form hf:NAME[:CONFIG][@SPLIT]")
        return match["name"], match["config"], match["split"] or "train"


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The sources that `paths` name, in that order; directories are walked in sorted order.

    Raises:
        TextError: a path is missing, or of a kind that is not read.
    """
    found: list[Source] = []
    for path in paths:
        if str(path).startswith("hf:"):
            found.append(DatasetSource(str(path)))
        else:
            found += _files(Path(path))
    return found


def differences(recorded: Sequence[dict[str, Any]], found: Sequence[Source]) -> list[str]:
    """How a corpus differs from the recorded one, a line each; empty if it does not."""
    then = [entry.get("file") or entry["dataset"] for entry in recorded]
    now = [source.name for source in found]
    changes = [f"{name} is missing" for name in then if name not in now]
    changes += [f"{name} is new" for name in now if name not in then]
    if not changes and then != now:
        changes = [f"the order was {', '.join(then)}"]
    if changes:
        return changes
    lines = (source.difference(entry) for source, entry in zip(found, recorded, strict=True))
    return [line for line in lines if line]


def _files(path: Path) -> list[FileSource]:
    files = text_files(path, SUFFIXES)
    root = path if path.is_dir() else path.parent
    return [FileSource(file, file.relative_to(root).as_posix()) for file in files]


def _parquet_documents(file: Path) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise TextError(f'{file}: no column "text"; it has {", ".join(table.schema_arrow.names)}')
            for batch in table.iter_batches(PARQUET_ROWS, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield text_field(f"{file}: row {number}", {"text": text}, "text")
    except TextError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise TextError(f"{file}: cannot be read as Parquet ({error})") from None


def _optional(module: str, what: object) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(
            f"{what}: reading it needs {package}, which is not installed; pip install 'osp-runtime[data]'"
        ) from None
