"""What the machine can do at most: bytes read from memory and 8-bit dot products in a second."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.engine.native_library import load_library

READ_BYTES = 2**29
SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured: `read_GBps` in 10^9 bytes, `dot_GOPS` in 10^9 multiplications and additions of 8-bit numbers."""

    read_GBps: float  # noqa: N815 - the unit
    dot_GOPS: float  # noqa: N815


def measure_limits(threads: int) -> Limits:
    """Measures both, on so many threads, for about a second."""
    library = load_library()
    return Limits(library.read_GBps(READ_BYTES, threads, SECONDS), library.dot_GOPS(threads, SECONDS))
