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
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory; name another, or remove it first")
    resolved = out.resolve()
    missing = [parent for parent in resolved.parents if not os.path.lexists(parent)]
    partial = resolved.with_name(f".{resolved.name}.{os.getpid()}.partial")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"{out} cannot be made: {error.strerror}") from error
        yield partial
        partial.rename(resolved)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:  # innermost first; one that holds something by now stays
            with suppress(OSError):
                parent.rmdir()
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies those of `COMPANION_FILES` that `source` has."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
