"""Text for calibration and evaluation: reads documents and cuts their tokens into windows. No torch.

The convention of perplexity, for every engine: a document is encoded by the tokenizer as it stands and cut by
`windows`; the first token of a window is not scored; perplexity is exp(sum of negative log likelihoods / number of
scored tokens), summed in float64.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.arithmetic import NonFiniteError

SUFFIXES = (".txt", ".md", ".jsonl")
"""What a directory is searched for. A .txt or .md file is one document; a .jsonl file holds one on every line."""


class TextError(ValueError):
    """Text that cannot be used; the message names the file (and the line) and says why."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`value` over `tokens` scored tokens."""

    value: float
    tokens: int

    @classmethod
    def from_sum(cls, negative_log_likelihood: float, tokens: int) -> Perplexity:
        """From the sum over `tokens` >= 1 scored tokens, in nats.

        Raises:
            NonFiniteError: the perplexity is NaN or infinite.
        """
        with np.errstate(over="ignore"):
            value = float(np.exp(negative_log_likelihood / tokens))
        if not np.isfinite(value):
            raise NonFiniteError(f"the model's perplexity over {tokens} tokens is {value}")
        return cls(value, tokens)


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """The documents of files and directories, in the order of `paths`; directories are walked in sorted order.

    A line of a .jsonl file is an object whose "text" is the document. Documents of white space only are skipped.

    Raises, while iterating:
        TextError: a path is missing or of another kind, a file is not UTF-8, a line has no text, or all of
            `paths` together hold no document.
    """
    empty = True
    for path in paths:
        for file in text_files(Path(path)):
            for document in file_documents(file):
                if document.strip():
                    empty = False
                    yield document
    if empty:
        raise TextError(f"no text in {', '.join(str(path) for path in paths) or 'an empty list of paths'}")


def windows(documents: Iterable[list[int]], context_length: int) -> Iterator[list[int]]:
    """Each document's tokens in consecutive windows of `context_length`; a last window of one token is dropped."""
    for tokens in documents:
        for start in range(0, len(tokens), context_length):
            window = tokens[start : start + context_length]
            if len(window) >= 2:
                yield window


def text_files(path: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file `path`, or the files in the directory `path`, at any depth, in sorted order.

    Raises:
        TextError: it is missing, of another kind, or a directory without such a file.
    """
    try:
        return _found(path, suffixes)
    except OSError as error:  # a name too long, a directory on the way that may not be entered
        raise TextError(f"{path}: cannot be read ({error.strerror})") from None


def _found(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if not files:
            raise TextError(f"{path}: no {', '.join(suffixes)} file in this directory")
        return files
    if not path.exists():
        raise TextError(f"{path}: no such file or directory")
    if path.suffix not in suffixes:
        raise TextError(f"{path}: not a text file this program reads ({', '.join(suffixes)})")
    if not path.is_file():  # opening a pipe would wait for ever
        raise TextError(f"{path}: not a file")
    return [path]


def file_documents(file: Path) -> Iterator[str]:
    """The documents of one file; errors as `read_documents`, but that it may have none."""
    if file.suffix == ".jsonl":
        for where, record in json_lines(file):
            yield text_field(where, record, "text")
    else:
        with _reading(file):
            yield file.read_text(encoding="utf-8")


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", object) of every line that is not blank.

    Raises, while iterating:
        TextError: the file cannot be read, or a line is no JSON object.
    """
    with _reading(file), file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}:{number}"
                yield where, _object(line, where)


def text_field(where: str, record: Mapping[str, Any], key: str) -> str:
    """The string that `record` has under `key`; raises `TextError` where there is none, or one that is not Unicode."""
    text = record.get(key)
    if not isinstance(text, str):
        raise TextError(f'{where}: no "{key}" field that holds a string')
    require_unicode(where, text)
    return text


def require_unicode(where: str, text: str) -> None:
    """Raises `TextError` for half a surrogate pair, which JSON can escape."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TextError(f"{where}: the text holds half a surrogate pair and is not Unicode")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise TextError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise TextError(f"{file}: cannot be read ({error.strerror})") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{where}: not a JSON object ({error})") from None
    except RecursionError:
        raise TextError(f"{where}: not a JSON object this program reads (nested too deeply)") from None
    if not isinstance(record, dict):
        raise TextError(f"{where}: not a JSON object")
    return record
