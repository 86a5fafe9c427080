"""The rows of the comparison with peers: what is measured, beside which neighbour, and which ratio is aimed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True, slots=True)
class Decode:
    """`tokens` tokens in each of `batch` sequences, which hold `context` tokens before."""

    tokens: int
    batch: int = 1
    context: int = 0

    @property
    def total_tokens(self) -> int:
        """Of all sequences."""
        return self.tokens * self.batch

    def request(self) -> dict[str, Any]:
        """As `benchmarks.worker` understands it."""
        return {"measure": "decode", "batch": self.batch, "context": self.context, "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt of `tokens` tokens."""

    tokens: int

    @property
    def total_tokens(self) -> int:
        """Of the prompt."""
        return self.tokens

    def request(self) -> dict[str, Any]:
        """As `benchmarks.worker` understands it."""
        return {"measure": "prefill", "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        neighbour: who is busy on the same cores; see `benchmarks.neighbour`.
        goals: by the peer's name, how many times its rate this project's engine is meant to reach.
        kept_goal: which part of its rate it is meant to keep beside the neighbour.
    """

    name: str
    title: str
    work: Decode | Prefill
    neighbour: str | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    kept_goal: float | None = None

    @property
    def needs_whole_model(self) -> bool:
        """Whether it cannot be measured with matrix products alone."""
        return isinstance(self.work, Decode) and self.work.context > 0


ONE_STREAM = Decode(tokens=32)
ROWS = (
    Row(
        "decode-1",
        "decode, batch 1",
        ONE_STREAM,
        goals={"llama.cpp": 2.0, "openvino": 1.1, "onnxruntime": 1.1, "osp-bf16": 3.5},
    ),
    Row(
        "decode-1-long",
        "decode, batch 1, context 1,500",
        Decode(tokens=32, context=1500),
        goals={"llama.cpp": 2.0},
    ),
    Row("decode-8", "decode, batch 8", Decode(tokens=16, batch=8), goals={"openvino": 1.1}),
    Row("decode-16", "decode, 16 streams", Decode(tokens=16, batch=16), goals={"llama.cpp": 3.0}),
    Row(
        "prefill-512",
        "prefill, 512 tokens",
        Prefill(512),
        goals={"llama.cpp": 4.5, "openvino": 1.1, "osp-bf16": 4.0},
    ),
    Row("beside-spin", "decode, batch 1, beside one spinning thread", ONE_STREAM, "spin", kept_goal=0.6),
    Row("beside-matmul", "decode, batch 1, beside two threads of torch", ONE_STREAM, "matmul", kept_goal=0.4),
)


def rows_named(pattern: str) -> list[Row]:
    """The rows with a name that fits the pattern, as file names fit in a shell.

    Raises:
        ValueError: none does.
    """
    rows = [row for row in ROWS if fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no row is called {pattern}; there are: {', '.join(row.name for row in ROWS)}")
    return rows
