"""`osp info` and `osp eval`: what a model is, and how good it is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from quant.format import Checkpoint, read_checkpoint, read_tokenizer
from quant.llama import LlamaConfig
from quant.scheme import LINEAR_SITES, LinearScheme, Scheme
from quant.tasks import read_questions, score_task
from quant.text import read_documents
from runtime.engine.onnx_provider import PROVIDERS
from runtime.engine.registry import EngineOptions
from runtime.evaluate import EVALUATION_ENGINES, load_scorer, perplexity
from runtime.model_store import DEFAULT_MODEL, recorded_quality, resolve_model

COLUMN = 12
"""The width of the names in the text of `osp info`."""


@click.command(short_help="Say what a model is: scheme, sizes, recorded quality.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Say what MODEL is: its scheme, its sizes in bytes, the quality recorded when it was made.

    MODEL is a directory, a Hugging Face name, or a bundled name.

    The KV cache's bytes per token are those of the scheme. At 16 bit, the reference engine holds keys and values in
    float32, that is, in twice as many.
    """
    description = describe(read_checkpoint(resolve_model(model)))
    click.echo(json.dumps(description, ensure_ascii=False) if as_json else _as_text(model, description))


@click.command("eval", short_help="Measure a model: perplexity on text, accuracy at tasks.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Text; may be repeated.")
@click.option("--task", multiple=True, type=click.Path(path_type=Path), help="Questions, .jsonl; may be repeated.")
@click.option(
    "--engine", default="auto", show_default=True, help=f"The engine to run: {', '.join(EVALUATION_ENGINES)}."
)
@click.option(
    "--onnx-provider",
    type=click.Choice(list(PROVIDERS)),
    default="cpu",
    show_default=True,
    help="What the engine onnx runs its graph on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: str, data: tuple[Path, ...], task: tuple[Path, ...], engine: str, onnx_provider: str, as_json: bool
) -> None:
    """Measure MODEL: its perplexity on text, its accuracy at multiple-choice tasks.

    MODEL is a directory, a Hugging Face name, or a bundled name. --data names a .txt or .md file, a .jsonl file whose
    lines have a "text", or a directory of these.

    --task names a .jsonl file whose lines are questions such as {"context": "The sky is", "choices": [" blue",
    " green"], "label": 0}. They are scored as lm-evaluation-harness does, by the sum of the log likelihoods of a
    choice's tokens (accuracy), and by that sum per byte of the choice (accuracy_norm).

    The engine "torch" is the quantizer's own simulation, for evaluation only; it needs the extra "quant".
    """
    if not data and not task:
        raise click.UsageError("nothing to measure: give --data, --task, or both")
    show_progress = sys.stderr.isatty()

    def progress(tokens: int) -> None:
        if show_progress:
            click.echo(f"\r{tokens:,} tokens", err=True, nl=False)

    tasks = {file: read_questions(file) for file in task}  # first, as a mistake in them is found at once
    path = resolve_model(model)
    options = EngineOptions(onnx_provider=onnx_provider)
    scorer, tokenizer = load_scorer(engine, path, progress, options), read_tokenizer(path)
    try:
        measured = perplexity(scorer, tokenizer, read_documents(data)) if data else None
        results = [
            score_task(file.stem, questions, tokenizer, scorer.context_length, scorer.log_likelihoods)
            for file, questions in tasks.items()
        ]
    finally:
        if show_progress:
            click.echo("\r\033[K", err=True, nl=False)  # back to an empty line
    report = {
        "perplexity": measured.value if measured else None,
        "tokens": measured.tokens if measured else None,
        "engine": scorer.engine,
        "precision": scorer.precision,
        "tasks": [asdict(result) for result in results],
    }
    click.echo(json.dumps(report) if as_json else _report_as_text(report))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `osp info --json`.

    Bytes are those of the parameters as stored, scales included: body, head, embedding and norms are the whole weight
    file but for its header. A tied head is the embedding itself and has 0 bytes of its own.
    """
    config, scheme = checkpoint.config, checkpoint.scheme
    body_weights = sum(rows * columns for rows, columns in config.linear_shapes().values())
    table_weights = sum(rows * columns for rows, columns in config.table_shapes().values())
    body_bytes = sum(linear.nbytes for linear in checkpoint.linears.values())
    return {
        "scheme": checkpoint.precision,
        "settings": scheme.to_dict() if scheme else None,
        "parameters": body_weights + table_weights + sum(norm.size for norm in checkpoint.norms.values()),
        "layers": config.num_hidden_layers,
        "context": config.max_position_embeddings,
        "body_bits_per_weight": 8 * body_bytes / body_weights,
        "bytes": {
            "body": body_bytes,
            "head": 0 if config.tie_word_embeddings else checkpoint.head.nbytes,
            "embedding": checkpoint.embedding.nbytes,
            "norms": sum(norm.nbytes for norm in checkpoint.norms.values()),
            "kv_per_token": kv_bytes_per_token(config, scheme.kv_bits if scheme else 16),
        },
        "quality": recorded_quality(checkpoint.provenance),
        "warning": checkpoint.provenance.get("warning"),
    }


def kv_bytes_per_token(config: LlamaConfig, kv_bits: int) -> int:
    """Bytes that a token's keys and values take in the cache of a scheme.

    Each quantized head of each token has a bfloat16 scale and a zero point of one byte beside its codes.
    """
    head_bytes = config.head_dim * kv_bits // 8 + (3 if kv_bits < 16 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_bytes


def _as_text(model: str, description: dict[str, Any]) -> str:
    sizes, settings = description["bytes"], description["settings"]
    scheme = Scheme.from_dict(settings) if settings else None
    kv_bits = scheme.kv_bits if scheme else 16
    kv_note = "; the reference engine holds 32" if kv_bits == 16 else ", scales and zero points included"
    rows = {
        "model": model,
        "scheme": f"{description['scheme']}, {description['body_bits_per_weight']:.3f} bits a weight of the body",
        **(_scheme_rows(scheme) if scheme else {}),
        "parameters": f"{description['parameters']:,}",
        "layers": f"{description['layers']}",
        "context": f"{description['context']:,} tokens",
        "body": f"{sizes['body']:,} bytes",
        "head": f"{sizes['head']:,} bytes" if sizes["head"] else "tied to the embedding",
        "embedding": f"{sizes['embedding']:,} bytes",
        "norms": f"{sizes['norms']:,} bytes",
        "KV cache": f"{sizes['kv_per_token']:,} bytes a token at {kv_bits} bit{kv_note}",
        "quality": _quality_as_text(description["quality"]),
    }
    if description["warning"]:
        rows["warning"] = description["warning"]
    return "\n".join(f"{name:<{COLUMN}}{value}" for name, value in rows.items())


def _scheme_rows(scheme: Scheme) -> dict[str, str]:
    """Linear sites that are quantized alike share a line."""
    sites: dict[LinearScheme, list[str]] = {}
    for site in (*LINEAR_SITES, "head"):
        sites.setdefault(getattr(scheme, site), []).append(site)
    lines = [f"{', '.join(names)}: {_linear_as_text(linear)}" for linear, names in sites.items()]
    lines.append(f"embedding: {scheme.embedding_bits}-bit" + (" per row" if scheme.embedding_bits < 16 else ""))
    return {"sites": f"\n{'':<{COLUMN}}".join(lines), "hadamard": scheme.hadamard}


def _linear_as_text(linear: LinearScheme) -> str:
    weights = f"{linear.weight_bits}-bit weights"
    weights += f" per {linear.weight_granularity}" if linear.weight_bits < 16 else ""
    inputs = f"{linear.activation_bits}-bit inputs"
    inputs += f" per {linear.activation_granularity}" if linear.activation_bits < 16 else ""
    return f"{weights}, {inputs}"


def _quality_as_text(quality: dict[str, Any] | None) -> str:
    if not quality:
        return "not recorded"
    return ", ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in quality.items()
    )


def _report_as_text(report: dict[str, Any]) -> str:
    by = f"({report['engine']} engine, {report['precision']})"
    lines = []
    if report["tokens"] is not None:
        lines.append(f"perplexity {report['perplexity']:.4f} over {report['tokens']:,} tokens {by}")
    for result in report["tasks"]:
        accuracy, norm = (_share_as_text(result[key], result[f"{key}_stderr"]) for key in ("accuracy", "accuracy_norm"))
        count = f"{result['questions']:,} question" + ("s" if result["questions"] > 1 else "")
        lines.append(f"{result['task']}: accuracy {accuracy}, per byte {norm}, {count} {by}")
    return "\n".join(lines)


def _share_as_text(share: float, stderr: float | None) -> str:
    return f"{share:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
