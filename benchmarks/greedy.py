"""Greedy text of the native engine, held against the reference engine token by token.

    python -m benchmarks.greedy --data build/demo/data/held_out.jsonl --prompts 200 --tokens 64

The native engine continues all prompts in batches. Each text is then fed to the reference engine at once: every token
must be its first choice. Where an activation lies on the border between two codes, the engines may round it
differently, since they sum floats in another order, and what follows differs by a code's worth: two tokens that are
about equally likely may then change places. Such ties are counted, and how far the chosen token's logit lies below the
reference's first choice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant.format import read_checkpoint
from quant.text import read_documents, windows
from quant.tokenizer import read_tokenizer
from runtime.engine.native import NativeRunner
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import ModelRunner, SequenceSlice
from runtime.model_store import resolve_model

BATCH = 32


def greedy(runner: ModelRunner, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens for each prompt, all in one batch. The runner has blocks for all of them."""
    blocks = -(-(max(map(len, prompts)) + count) // runner.block_size)
    tables = [np.arange(i * blocks, (i + 1) * blocks, dtype=np.int32) for i in range(len(prompts))]
    sequences = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    for _ in range(count):
        batch = [
            SequenceSlice(np.array(tokens[start:], np.int32), start, table)
            for tokens, start, table in zip(sequences, done, tables, strict=True)
        ]
        done = [len(tokens) for tokens in sequences]
        for tokens, token in zip(sequences, runner.step(batch).argmax(), strict=True):
            tokens.append(int(token))
    return [tokens[len(prompt) :] for tokens, prompt in zip(sequences, prompts, strict=True)]


def shortfall(reference: ModelRunner, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """How far the logit of each token lies below the reference's highest: 0 where it is its first choice. [L]"""
    ids = np.array([*prompt, *tokens], np.int32)[:-1]
    table = np.arange(-(-len(ids) // reference.block_size), dtype=np.int32)
    logits_LV = reference.step([SequenceSlice(ids, 0, table, num_logits=len(tokens))]).rows()
    below_L: NDArray[np.float32] = logits_LV.max(axis=-1) - logits_LV[np.arange(len(tokens)), tokens]
    return below_L


def held_out_prompts(model: Path, data: Path, count: int, length: int) -> list[list[int]]:
    """The beginnings of the first `count` windows of the text.

    Raises:
        click.ClickException: the text has fewer.
    """
    tokenizer = read_tokenizer(model)
    documents = ([*tokenizer.encode(text).ids] for text in read_documents([data]))
    prompts = [window[:length] for window in windows(documents, length + 1) if len(window) > length]
    if len(prompts) < count:
        raise click.ClickException(f"{data} has {len(prompts)} windows of {length} tokens; {count} are wanted")
    return prompts[:count]


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Held-out text.")
@click.option("--prompts", "count", default=200, show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Tokens to generate for each prompt.")
def main(model: str, data: Path, count: int, prompt_tokens: int, tokens: int) -> None:
    """Holds the native engine's greedy text against the reference engine's first choices."""
    path = resolve_model(model)
    prompts = held_out_prompts(path, data, count, prompt_tokens)
    blocks = -(-(prompt_tokens + tokens) // 16)
    native = NativeRunner(path, num_blocks=BATCH * blocks)
    reference = ReferenceRunner(read_checkpoint(path), num_blocks=blocks, kv_float=ml_dtypes.bfloat16)
    below: list[NDArray[np.float32]] = []
    batches = range(0, count, BATCH)
    with click.progressbar(batches, label="comparing", file=sys.stderr) as starts:
        for start in starts:
            part = prompts[start : start + BATCH]
            texts = greedy(native, part, tokens)
            below += [shortfall(reference, prompt, text) for prompt, text in zip(part, texts, strict=True)]
    below_NL = np.stack(below)
    other_N = (below_NL > 0).any(axis=1)
    report = {
        "model": model,
        "prompts": count,
        "tokens": int(below_NL.size),
        "other_first_choice": int((below_NL > 0).sum()),
        "texts_without_any": int((~other_N).sum()),
        "largest_shortfall": round(float(below_NL.max()), 4),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
