"""`osp info` and `osp eval`: what a model is, and how good it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from quant.format import Checkpoint, read_checkpoint, read_tokenizer
from quant.text import read_documents
from runtime.engine.registry import load_runner
from runtime.evaluate import perplexity
from runtime.model_store import DEFAULT_MODEL, recorded_quality, resolve_model


@click.command(short_help="Say what a model is: scheme, sizes, recorded quality.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Say what MODEL is: its scheme, its sizes in bytes, the quality recorded when it was made.

    MODEL is a directory, a Hugging Face name, or a bundled name.

    The KV cache's bytes per token are those of the scheme (16 bit). The reference engine of this release holds keys and
    values in float32, that is, twice as many.
    """
    description = describe(read_checkpoint(resolve_model(model)))
    click.echo(json.dumps(description, ensure_ascii=False) if as_json else _as_text(model, description))


@click.command("eval", short_help="Measure the perplexity of a model on text.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--data", multiple=True, required=True, type=click.Path(path_type=Path), help="Text; may be repeated.")
@click.option("--engine", default="auto", show_default=True, help="The engine to run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: str, data: tuple[Path, ...], engine: str, as_json: bool) -> None:
    """Measure the perplexity of MODEL on text.

    MODEL is a directory, a Hugging Face name, or a bundled name. --data names a .txt or .md file, a .jsonl file whose
    lines have a "text", or a directory of these.
    """
    show_progress = sys.stderr.isatty()

    def progress(tokens: int) -> None:
        if show_progress:
            click.echo(f"\r{tokens:,} tokens", err=True, nl=False)

    path = resolve_model(model)
    runner = load_runner(engine, path)
    try:
        measured = perplexity(runner, read_tokenizer(path), read_documents(data), progress)
    finally:
        if show_progress:
            click.echo("\r\033[K", err=True, nl=False)  # back to an empty line
    report = {
        "perplexity": measured.value,
        "tokens": measured.tokens,
        "engine": runner.info.engine,
        "precision": runner.info.precision,
    }
    text = "perplexity {perplexity:.4f} over {tokens:,} tokens ({engine} engine, {precision})"
    click.echo(json.dumps(report) if as_json else text.format(**report))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `osp info --json`.

    Bytes are those of the parameters as stored. A tied head is the embedding itself and has 0 bytes of its own.
    """
    config, scheme = checkpoint.config, checkpoint.scheme
    body_weights = sum(rows * columns for rows, columns in config.linear_shapes().values())
    body_bytes = sum(linear.nbytes for linear in checkpoint.linears.values())
    embedding_bytes = checkpoint.floats["model.embed_tokens.weight"].nbytes
    head_bytes = 0 if config.tie_word_embeddings else checkpoint.head.nbytes
    kv_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "scheme": checkpoint.precision,
        "parameters": body_weights + sum(tensor.size for tensor in checkpoint.floats.values()),
        "layers": config.num_hidden_layers,
        "context": config.max_position_embeddings,
        "body_bits_per_weight": 8 * body_bytes / body_weights,
        "bytes": {
            "body": body_bytes,
            "head": head_bytes,
            "embedding": embedding_bytes,
            "norms": sum(tensor.nbytes for tensor in checkpoint.floats.values()) - embedding_bytes - head_bytes,
            "kv_per_token": kv_values * (scheme.kv_bits if scheme else 16) // 8,
        },
        "quality": recorded_quality(checkpoint.provenance),
        "warning": checkpoint.provenance.get("warning"),
    }


def _as_text(model: str, description: dict[str, Any]) -> str:
    sizes = description["bytes"]
    rows = {
        "model": model,
        "scheme": f"{description['scheme']}, {description['body_bits_per_weight']:.3f} bits a weight of the body",
        "parameters": f"{description['parameters']:,}",
        "layers": f"{description['layers']}",
        "context": f"{description['context']:,} tokens",
        "body": f"{sizes['body']:,} bytes",
        "head": f"{sizes['head']:,} bytes" if sizes["head"] else "tied to the embedding",
        "embedding": f"{sizes['embedding']:,} bytes",
        "norms": f"{sizes['norms']:,} bytes",
        "KV cache": f"{sizes['kv_per_token']:,} bytes a token at 16 bit; the reference engine holds 32",
        "quality": _quality_as_text(description["quality"]),
    }
    if description["warning"]:
        rows["warning"] = description["warning"]
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def _quality_as_text(quality: dict[str, Any] | None) -> str:
    if not quality:
        return "not recorded"
    return ", ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in quality.items()
    )
