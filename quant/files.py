"""The small files of a checkpoint directory: JSON, hashes. Whatever is wrong with one is a `CheckpointError`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.llama import CheckpointError

DEEPEST_JSON = 32
"""Levels of nesting that are read: no file of a checkpoint has ten, and thousands would exhaust Python's stack."""


def read_text(root: Path, name: str, if_missing: str) -> str:
    """The UTF-8 text of `root / name`; a file that is missing is refused with the words `if_missing`."""
    path = root / name
    if not os.path.lexists(path):
        raise CheckpointError(root, f"{name} is missing; {if_missing}")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise CheckpointError(root, f"{name} cannot be read: it is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(root, f"{name} cannot be read: {error}") from None


def read_json(root: Path, name: str, if_missing: str) -> dict[str, Any]:
    """The JSON object in `root / name`."""
    text = read_text(root, name, if_missing)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(root, f"{name} cannot be read: {error}") from None
    except RecursionError:
        content = None
    if content is None or _is_deep(content):
        raise CheckpointError(
            root, f"{name} cannot be read: it must hold a JSON object of at most {DEEPEST_JSON} levels"
        )
    if not isinstance(content, dict):
        raise CheckpointError(root, f"{name} must hold a JSON object, not a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, with a final newline, as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
    return bool(level)
