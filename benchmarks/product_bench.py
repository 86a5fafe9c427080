"""What an engine takes that computes a model's matrix products and nothing else: no norms, no attention, no SwiGLU."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.worker import UnsupportedError


class Products(Protocol):
    """The matrices of `benchmarks.random_int4.products`, one after the other."""

    def __call__(self, x_ND: NDArray[np.float32], head_rows: int) -> NDArray[np.float32]:
        """Logits of the last `head_rows` rows: a prompt needs those of its last token only.

        Returns:
            [head_rows, V]
        """
        ...


class ProductBench:
    """A `benchmarks.worker.Bench` of products."""

    def __init__(self, products: Products, width: int, seed: int = 0) -> None:
        self._products, self._width = products, width
        self._rng = np.random.default_rng(seed)

    def decode(self, batch: int, context: int, tokens: int) -> float:
        """As `Bench.decode`. One step goes before, and is not timed.

        Raises:
            UnsupportedError: there is a context, which takes attention.
        """
        if context:
            raise UnsupportedError(f"matrix products alone have no context; {context} tokens of it are asked for")
        x_ND = self._activations(batch)
        self._check(self._products(x_ND, batch), batch)
        start = time.perf_counter()
        for _ in range(tokens):
            self._products(x_ND, batch)
        return batch * tokens / (time.perf_counter() - start)

    def prefill(self, tokens: int) -> float:
        """As `Bench.prefill`."""
        x_ND = self._activations(tokens)
        start = time.perf_counter()
        logits_NV = self._products(x_ND, 1)
        elapsed_s = time.perf_counter() - start
        self._check(logits_NV, 1)
        return tokens / elapsed_s

    def close(self) -> None:
        """There is nothing to free."""

    def _activations(self, rows: int) -> NDArray[np.float32]:
        return self._rng.standard_normal((rows, self._width), np.float32)

    @staticmethod
    def _check(logits_NV: NDArray[np.float32], rows: int) -> None:
        """A library that skipped work, or computes with infinities, would give a rate that means nothing."""
        if logits_NV.shape[0] != rows or not np.isfinite(logits_NV).all() or not logits_NV.any():
            raise ArithmeticError(f"logits of shape {logits_NV.shape} for {rows} rows are not finite, or all zero")
