"""Progress bars on stderr, or silence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

LABEL = 40
"""The width of what stands before a bar."""


class Progress:
    """Shows phases one after another."""

    def __init__(self, visible: bool) -> None:
        """Without a terminal each phase is one line, which says that it began."""
        self._visible = visible

    @contextmanager
    def phase(self, label: str, length: int) -> Iterator[Callable[[], None]]:
        """A phase of `length` steps; what it gives is called after each."""
        if not self._visible:
            yield lambda: None
            return
        with click.progressbar(length=length, label=f"{label:<{LABEL}}", file=sys.stderr, show_pos=True) as bar:
            yield lambda: bar.update(1)
