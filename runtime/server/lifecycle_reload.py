"""Files that are read anew when they change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.server.auth import ApiKeyError
from runtime.server.tls import TlsError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Reloadable:
    """Something that is read from files: its name, the files, and what reads them."""

    name: str
    files: tuple[Path, ...]
    reload: Callable[[], None]


async def reload_on_change(reloadables: Sequence[Reloadable], asked: asyncio.Event) -> None:
    """Reloads whatever has changed on disk, and everything when `asked` is set; until it is cancelled.

    What cannot be used is logged, and leaves the server with what it had.
    """
    seen = [_state(reloadable) for reloadable in reloadables]
    while True:
        try:
            async with asyncio.timeout(LOOK_EVERY_S):
                await asked.wait()
        except TimeoutError:
            pass
        everything = asked.is_set()
        asked.clear()
        for i, reloadable in enumerate(reloadables):
            state = _state(reloadable)
            if everything or state != seen[i]:
                seen[i] = state
                _reload(reloadable)


def _reload(reloadable: Reloadable) -> None:
    try:
        reloadable.reload()
    except (ApiKeyError, TlsError) as error:
        log.error("%s as before: %s", reloadable.name, error)
    else:
        log.info("%s read anew", reloadable.name)


def _state(reloadable: Reloadable) -> list[tuple[int, int, int] | None]:
    """What changes when a file is written to or put in its place."""
    states: list[tuple[int, int, int] | None] = []
    for file in reloadable.files:
        try:
            status = file.stat()
        except OSError:
            states.append(None)
        else:
            states.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return states
