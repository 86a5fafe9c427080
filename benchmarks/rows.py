"""What the tables of docs/quantization.md hold: the ways to quantize a model, and where each stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.llama import LlamaConfig
from quant.scheme import HADAMARDS, LINEAR_SITES, QUANTIZED_HEAD, LinearScheme, Scheme, named

W4A4 = named("w4a4")
W4A4_FFN = W4A4.changed(hadamard="ffn")

TABLE_BITS = ((16, 16), (8, 16), (4, 16), (16, 8), (16, 4), (8, 8), (4, 4))
"""Of the head and of the embedding; a tied model has one table for both."""

TASK_ROWS = ("w4a16", "w4a8", "w4a4-token", "w4a4-token full", "w4a4", "w4a4 ffn", "w4a4 full")
"""The names of the rows that tasks are put to: a task takes several times as long as perplexity."""


@dataclass(frozen=True, slots=True)
class Row:
    """A way to quantize the model, by a name that tells it from all others; `weights` as in `quantize_checkpoint`."""

    name: str
    scheme: Scheme
    weights: str = "rtn"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of rows: under every label, one for each column but the first, None where a cell stays empty."""

    title: str
    note: str
    columns: tuple[str, ...]
    lines: Mapping[str, tuple[Row | None, ...]]

    def rows(self) -> Iterator[Row]:
        """Those of all cells, line by line."""
        for line in self.lines.values():
            yield from (row for row in line if row is not None)


def tables(config: LlamaConfig) -> list[Table]:
    """The tables for a model of this shape."""
    return [_schemes(), _kv_cache(), _head_and_embedding(config), _sites(config)]


def _schemes() -> Table:
    lines = {}
    for name, weights in (("w4a16", "rtn"), ("w4a8", "rtn"), ("w4a4-token", "rtn"), ("w4a4", "rtn"), ("w4a4", "gptq")):
        label = name if weights == "rtn" else f"{name}, GPTQ"
        lines[label] = tuple(_row(named(name), weights, hadamard=hadamard) for hadamard in HADAMARDS)
    return Table(
        "Schemes and rotation",
        "Head, embedding and KV cache in 16 bits. Weights are rounded to nearest unless it says GPTQ.",
        ("scheme", "as it is", "FFN Hadamard", "full rotation"),
        lines,
    )


def _kv_cache() -> Table:
    return Table(
        "KV cache",
        "`w4a4` with the FFN Hadamard; head and embedding in 16 bits.",
        ("bits of keys and values", "perplexity"),
        {str(bits): (_row(W4A4_FFN, kv_bits=bits),) for bits in (16, 8, 4)},
    )


def _head_and_embedding(config: LlamaConfig) -> Table:
    tied = config.tie_word_embeddings
    return Table(
        "Head and embedding",
        "`w4a4` with the FFN Hadamard, KV cache in 16 bits; the head's inputs have 8 bits, one scale a token."
        + (" The head is tied to the embedding." if tied else ""),
        ("bits of head, embedding", "perplexity"),
        {
            f"{head}, {embedding}": (_row(W4A4_FFN, head=head, embedding_bits=embedding),)
            for head, embedding in TABLE_BITS
            if head == embedding or not tied
        },
    )


def _sites(config: LlamaConfig) -> Table:
    body = {site: _alone(site, **{site: getattr(W4A4, site)}) for site in LINEAR_SITES}
    head, embedding = {"head": QUANTIZED_HEAD[4]}, {"embedding_bits": 4}
    if config.tie_word_embeddings:
        others = [_alone("head and embedding", **head, **embedding)]
    else:
        others = [_alone("head", **head), _alone("embedding", **embedding)]
    others.append(_alone("KV cache", kv_bits=4))
    down_ffn = _alone("down", **{"down": W4A4.down}, hadamard="ffn")
    lines: dict[str, tuple[Row | None, ...]] = {
        site: (row, down_ffn if site == "down" else None) for site, row in body.items()
    }
    return Table(
        "Each site alone",
        "That site as in `w4a4`, all else in 16 bits. Head, embedding and KV cache in 4 bits, the head's inputs in 8.",
        ("site", "as it is", "FFN Hadamard"),
        lines | {row.name.removeprefix("only "): (row, None) for row in others},
    )


def _row(base: Scheme, weights: str = "rtn", **changes: Any) -> Row:
    """The row of a named scheme that is changed; it is called by all in which it differs from that one."""
    scheme = base.changed(**changes)
    words = [scheme.label]
    words += [scheme.hadamard] if scheme.hadamard != "none" else []
    words += [weights] if weights != "rtn" else []
    return Row(" ".join(words), scheme, weights)


def _alone(site: str, **settings: Any) -> Row:
    """Nothing quantized but what `settings` say."""
    sixteen: dict[str, Any] = dict.fromkeys(LINEAR_SITES, LinearScheme())
    scheme = Scheme(**{"name": "w4a4"} | sixteen | settings)
    return Row(f"only {site}" + (f" {scheme.hadamard}" if scheme.hadamard != "none" else ""), scheme)
