"""`osp bench kernel`: each kernel's matrix products, beside the machine's read bandwidth and dot-product peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.bench.limits import Limits
from runtime.engine.native_library import load_library

OUTPUTS, COLUMNS = 65_536, 2048
"""Of the matrix: in 4 bits 67 MB, more than any cache of the machines that this is for holds."""

FEWER_OUTPUTS = 4096
"""Of that for many rows, which need not come from memory."""

FORMATS = {"w4": "int4", "w8": "int8", "bf16": "bfloat16"}
BITS = {"w4": 4, "w8": 8, "bf16": 16}
DECODE_ROWS, PREFILL_ROWS = (1, 8, 16), 512
SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One product.

    Attributes:
        seconds: median.
        read_GBps: weight bytes over time, in 10^9.
        dot_GOPS: multiplications and additions over time, in 10^9.
        read_share, dot_share: of the machine's limits; the larger one says what bounds the product.
    """

    kernel: str
    weights: str
    rows: int
    seconds: float
    read_GBps: float  # noqa: N815 - the unit
    dot_GOPS: float  # noqa: N815
    read_share: float
    dot_share: float


def measure_kernels(
    limits: Limits, threads: int, kernels: Sequence[str], formats: Sequence[str] = tuple(FORMATS)
) -> Iterator[KernelRow]:
    """A row for every kernel, format of weights and number of input rows."""
    for kernel in kernels:
        for weights in formats:
            for rows in (*DECODE_ROWS, PREFILL_ROWS):
                yield _measure(kernel, weights, rows, threads, limits)


def _measure(kernel: str, weights: str, rows: int, threads: int, limits: Limits) -> KernelRow:
    outputs = FEWER_OUTPUTS if rows == PREFILL_ROWS else OUTPUTS
    seconds = load_library().time_product(kernel, FORMATS[weights], rows, outputs, COLUMNS, threads, SECONDS)
    read = outputs * COLUMNS * BITS[weights] / 8 / seconds / 1e9
    operations = 2 * rows * outputs * COLUMNS / seconds / 1e9
    return KernelRow(
        kernel, weights, rows, seconds, read, operations, read / limits.read_GBps, operations / limits.dot_GOPS
    )


def report(limits: Limits, threads: int, rows: Sequence[KernelRow]) -> dict[str, Any]:
    """The fields of `osp bench kernel --json`."""
    return {"threads": threads, **asdict(limits), "kernels": [asdict(row) for row in rows]}
