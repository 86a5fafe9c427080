"""`osp bench engine`: tokens a second of a whole model with random weights, through the calls that serving makes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.llama import LlamaConfig
from runtime.bench.limits import Limits
from runtime.bench.precision import DEFAULT_PRECISION, scheme_of
from runtime.bench.random_model import random_model
from runtime.bench.shapes import SHAPES
from runtime.engine.native import run_step
from runtime.engine.runner import SequenceSlice

BLOCK = 16
PREFILL_TOKENS = 512
DECODE_BATCHES = (1, 8, 16)
SECONDS = 2.0
"""About how long one measurement lasts."""


class EngineBench:
    """A model of random weights on the native engine, to be measured again and again."""

    def __init__(
        self,
        shape: str,
        precision: str = DEFAULT_PRECISION,
        threads: int | None = None,
        context: int = 4096,
        kernel: str = "",
    ) -> None:
        """Makes the model.

        Args:
            shape: of `SHAPES`.
            precision: as `scheme_of`.
            threads: None for as many as the process may use.
            context: positions of the KV cache, for all sequences together.

        Raises:
            KeyError: no such shape.
            SchemeError: no such precision.
            NativeLibraryError: the extension is not built.
        """
        self.config: LlamaConfig = SHAPES[shape]
        self.scheme = scheme_of(precision)
        self.precision, self.shape = precision, shape
        start = time.perf_counter()
        self._model = random_model(
            self.config,
            self.scheme,
            num_blocks=-(-context // BLOCK),
            max_rows=PREFILL_TOKENS,
            threads=threads or 0,
            kernel=kernel,
        )
        self.load_s = time.perf_counter() - start
        self._blocks = -(-context // BLOCK)
        self._filled: tuple[int, int] | None = None
        self._random = np.random.default_rng(0)

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs."""
        return str(self._model.kernel)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return int(self._model.threads)

    def decode(self, batch: int, context: int, tokens: int) -> float:
        """Tokens a second of `batch` sequences together, each making `tokens` tokens after `context` others.

        Raises:
            ValueError: the KV cache does not hold so many.
        """
        blocks = -(-(context + tokens + 1) // BLOCK)
        if batch * blocks > self._blocks:
            raise ValueError(f"{batch} sequences of {context + tokens + 1} positions do not fit into the KV cache")
        tables = [np.arange(i * blocks, (i + 1) * blocks, dtype=np.int32) for i in range(batch)]
        if self._filled != (batch, context):
            for table in tables:
                self._prefill(table, context)
            self._filled = batch, context
        ids = self._random.integers(0, self.config.vocab_size, batch).astype(np.int32)
        start = time.perf_counter()
        for position in range(context, context + tokens):
            slices = [SequenceSlice(ids[i : i + 1], position, table) for i, table in enumerate(tables)]
            run_step(self._model, slices, BLOCK)
            ids = np.array(self._model.argmax(), np.int32)
        return batch * tokens / (time.perf_counter() - start)

    def prefill(self, tokens: int = PREFILL_TOKENS) -> float:
        """Tokens a second of a prompt of `tokens` tokens, its last row's logits included."""
        self._filled = None
        table = np.arange(-(-tokens // BLOCK), dtype=np.int32)
        start = time.perf_counter()
        self._prefill(table, tokens)
        return tokens / (time.perf_counter() - start)

    def rss_MB(self) -> float:  # noqa: N802 - the unit
        """Resident memory of this process."""
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1000
        raise OSError("no VmRSS in /proc/self/status")

    def close(self) -> None:
        """Frees the model; nothing can be measured any more."""
        del self._model

    def bytes_of_a_step(self, context: int = 0) -> int:
        """Bytes that a decode step must read at batch 1: all weights but the embedding, and the keys and values."""
        linears = self.config.linear_shapes()
        bits = {module: self._weight_bits(module) for module in linears} | {"lm_head": self._weight_bits("lm_head")}
        sizes = linears | {"lm_head": (self.config.vocab_size, self.config.hidden_size)}
        weights = sum(rows * columns * bits[module] // 8 for module, (rows, columns) in sizes.items())
        kv_bits = self.scheme.kv_bits if self.scheme else 16
        heads = 2 * self.config.num_hidden_layers * self.config.num_key_value_heads
        return weights + context * heads * (self.config.head_dim * kv_bits // 8 + (3 if kv_bits < 16 else 0))

    def _weight_bits(self, module: str) -> int:
        return self.scheme.linear(module).weight_bits if self.scheme else 16

    def _prefill(self, table: NDArray[np.int32], tokens: int) -> None:
        for start in range(0, tokens, PREFILL_TOKENS):
            length = min(PREFILL_TOKENS, tokens - start)
            ids = self._random.integers(0, self.config.vocab_size, length).astype(np.int32)
            run_step(self._model, [SequenceSlice(ids, start, table)], BLOCK)


def measure_engine(bench: EngineBench, limits: Limits, rounds: int) -> dict[str, Any]:
    """The fields of `osp bench engine --json`: medians of `rounds`, and shares of the machine's limits.

    `decode_share`: bytes that a step at batch 1 must read, over what the machine reads in that time; `prefill_share`:
    multiplications and additions of a prompt of 512 tokens over those of the machine's dot products.
    """
    decode = {str(batch): _median(partial(_decode, bench, batch), rounds) for batch in DECODE_BATCHES}
    prefill = _median(bench.prefill, rounds)
    operations = 2 * sum(rows * columns for rows, columns in bench.config.linear_shapes().values())
    return {
        "shape": bench.shape,
        "engine": "native",
        "precision": bench.precision,
        "kernel": bench.kernel,
        "threads": bench.threads,
        "decode_tok_s": decode,
        "prefill_tok_s": prefill,
        "read_GBps": limits.read_GBps,
        "dot_GOPS": limits.dot_GOPS,
        "decode_share": bench.bytes_of_a_step() * decode["1"] / (limits.read_GBps * 1e9),
        "prefill_share": operations * prefill / (limits.dot_GOPS * 1e9),
        "rss_MB": bench.rss_MB(),
        "load_s": bench.load_s,
    }


def _decode(bench: EngineBench, batch: int) -> float:
    room = bench._blocks * BLOCK // batch - BLOCK
    few = min(8, room)
    rate = bench.decode(batch, 0, few)
    return bench.decode(batch, 0, max(few, min(room, round(rate * SECONDS / batch))))


def _median(measure: Callable[[], float], rounds: int) -> float:
    measure()  # warm
    return statistics.median(measure() for _ in range(rounds))
