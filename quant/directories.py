"""Checkpoint directories as they are written: whole or not at all, with the files that go along from the source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What lies beside the weights and stays as it is when they change form."""


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A new directory beside `out` that takes its place on success. On failure nothing of it remains, nor of the
    parents that were made for it.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
        OSError: no directory can be made there.
    """
    require_vacant(out)
    resolved = out.resolve()
    partial = resolved.with_name(f".{resolved.name}.{os.getpid()}.partial")
    made_parents = make_beside(out, partial)
    try:
        yield partial
        partial.rename(resolved)
    except BaseException:
        unmake(partial, made_parents)
        raise


def require_vacant(out: Path) -> None:
    """Raises `FileExistsError` if `out` exists and is not an empty directory."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory; name another, or remove it first")


def make_beside(out: Path, directory: Path) -> list[Path]:
    """Makes a directory beside `out`.

    Returns:
        The parents that were made for it, innermost first.

    Raises:
        OSError: it is there already, or cannot be made; nothing remains of its parents.
    """
    missing = [parent for parent in directory.parents if not os.path.lexists(parent)]
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        _remove_empty(missing)
        raise OSError(f"{out} cannot be made: {error.strerror}") from error
    return missing


def unmake(directory: Path, made_parents: list[Path]) -> None:
    """Removes a directory with all that is in it, and those of the parents that hold nothing else."""
    shutil.rmtree(directory, ignore_errors=True)
    _remove_empty(made_parents)


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        with suppress(OSError):  # one that holds something by now stays
            parent.rmdir()


def copy_companions(source: Path, target: Path) -> None:
    """Copies those of `COMPANION_FILES` that `source` has."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
