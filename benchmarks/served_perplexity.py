"""The perplexity of a model as a server computes it, beside that of an engine of this project:

    osp serve demo --engine vllm --vllm.enforce-eager --vllm.dtype=float32
    python -m benchmarks.served_perplexity http://127.0.0.1:8000 demo held_out.jsonl

The server scores prompts (`echo` with `logprobs`), and says how it cuts text into tokens, so that both score the same
windows. vLLM has no 4-bit KV cache; `--kv-bits 16`, the default, has the other engine keep keys and values whole too.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import httpx
import numpy as np
from numpy.typing import NDArray

from quant.files import write_json
from quant.llama import CheckpointError
from quant.tasks import ScoredWindow
from quant.text import TextError, read_documents, windows
from runtime.engine.registry import RUNNERS
from runtime.evaluate import load_scorer
from runtime.model_store import ModelNotFoundError, resolve_model

WINDOW = 256
TIMEOUT_S = 120.0


def tokenize(client: httpx.Client, document: str) -> list[int]:
    """The server's token ids of a text, special ones as it adds them."""
    tokens: list[int] = client.post("/tokenize", json={"prompt": document}).raise_for_status().json()["tokens"]
    return tokens


def served_scores(client: httpx.Client, cut: Sequence[list[int]]) -> NDArray[np.float64]:
    """Log-probabilities of every token of every window but its first, as the server answers."""
    scores: list[float] = []
    for window in cut:
        body = {"prompt": window, "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        scores += answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return np.array(scores)


def computed_scores(engine: str, path: Path, cut: Sequence[list[int]], kv_bits: int) -> NDArray[np.float64]:
    """The same by an engine of this project, from the checkpoint `path` with keys and values in `kv_bits`."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(shutil.copytree(path, Path(directory) / path.name))
        config = json.loads((copy / "config.json").read_text("utf-8"))
        if scheme := config.get("quantization_config", {}).get("scheme"):
            scheme["kv_bits"] = kv_bits
        write_json(copy / "config.json", config)
        scorer = load_scorer(engine, copy)
        return np.concatenate(list(scorer.log_likelihoods(ScoredWindow(tuple(w), len(w) - 1) for w in cut)))


@click.command()
@click.argument("url")
@click.argument("model")
@click.argument("text", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(RUNNERS), default="reference", show_default=True)
@click.option("--kv-bits", type=click.Choice([4, 8, 16]), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="Read no more of the text.")
def main(url: str, model: str, text: Sequence[Path], engine: str, kv_bits: int, tokens: int) -> None:
    """Compare the perplexity of the server at URL with MODEL's, on TEXT; prints one JSON object."""
    try:
        documents = read_documents(text)
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            cut: list[list[int]] = []
            for window in windows((tokenize(client, document) for document in documents), WINDOW):
                if sum(map(len, cut)) >= tokens:
                    break
                cut.append(window)
            served = served_scores(client, cut)
        computed = computed_scores(engine, resolve_model(model), cut, kv_bits)
    except (CheckpointError, ModelNotFoundError, TextError, httpx.HTTPError) as error:
        raise click.ClickException(str(error)) from error
    difference = np.abs(served - computed)
    click.echo(
        json.dumps(
            {
                "tokens": len(served),
                "served": math.exp(-served.mean()),
                engine: math.exp(-computed.mean()),
                "ratio": math.exp(computed.mean() - served.mean()),
                "mean_difference": difference.mean(),
                "largest_difference": difference.max(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
