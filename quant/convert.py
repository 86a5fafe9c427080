"""The pipeline: a Hugging Face Llama checkpoint in, a 4-bit checkpoint with its measured quality out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quant import arithmetic, format
from quant.calibrate import InputRange, calibrate
from quant.corpus import Corpus, read_corpus
from quant.format import Checkpoint, QuantizedLinear, read_checkpoint, read_tokenizer
from quant.llama import CheckpointError
from quant.model import load_model
from quant.perplexity import measure_perplexity
from quant.rounding import round_to_nearest
from quant.scheme import Scheme
from quant.text import Perplexity

CALIBRATION_TOKENS = 2**18
"""Calibration text is read up to here: static ranges settle long before."""

OUTLIER_SAFE_RATIO = 1.5
"""A model whose perplexity grows by more than this factor is not outlier-safe."""

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scheme: Scheme,
    *,
    calibration: Sequence[str | os.PathLike[str]] = (),
    heldout: Sequence[str | os.PathLike[str]] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Quantizes the checkpoint at `source` into the directory `out`, which appears whole or not at all.

    Args:
        calibration: text files or directories for the activation ranges; none means the bundled text.
        heldout: text to measure perplexity on; none means the last fifth of the calibration text, which is then
            not calibrated on.
        progress: bars on stderr where that is a terminal.

    Returns:
        What osp.json records: scheme, errors of every layer, hashes of the texts, perplexity before and after.
        "warning" is a sentence where the model does not survive 4 bits, else None.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
        OSError: `out` cannot be made.
        CheckpointError: `source` is not a usable full-precision checkpoint.
        TextError: a text cannot be read or is too short.
        NonFiniteError: a weight, an activation or a perplexity is NaN or infinite; the message names it.
    """
    source, out = Path(source), Path(out)
    _require_vacant(out)
    with _appearing_whole(out) as partial:  # first, so that a place where nothing can be written costs no work
        checkpoint = read_checkpoint(source)
        if checkpoint.scheme is not None:
            raise CheckpointError(source, f"is quantized already ({checkpoint.precision}); start from full precision")
        calibration_text, heldout_text = _read_texts(checkpoint, calibration, heldout)
        context = checkpoint.config.max_position_embeddings
        calibration_windows, heldout_windows = calibration_text.windows(context), heldout_text.windows(context)

        model = load_model(checkpoint)
        inputs = calibrate(model, calibration_windows, progress=progress)
        before = measure_perplexity(model, heldout_windows, progress=progress)
        del model  # before the next one takes as much memory

        linears, sites = _round_linears(checkpoint, inputs)
        report = _provenance(checkpoint, scheme, sites, calibration_text)
        for name in COPIED_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        config_json = json.loads((source / "config.json").read_text(encoding="utf-8"))
        format.write_quantized(partial, config_json, scheme, linears, checkpoint.floats, report)
        # What is measured is what was written, so that a fault in writing cannot hide.
        after = measure_perplexity(load_model(read_checkpoint(partial)), heldout_windows, progress=progress)
        report |= _quality(before, after, heldout_text)
        format.write_json(partial / "osp.json", report)
    return report


def _read_texts(
    checkpoint: Checkpoint, calibration: Sequence[str | os.PathLike[str]], heldout: Sequence[str | os.PathLike[str]]
) -> tuple[Corpus, Corpus]:
    tokenizer = read_tokenizer(checkpoint.path)
    corpus = read_corpus(calibration, tokenizer, limit=CALIBRATION_TOKENS)
    return (corpus, read_corpus(heldout, tokenizer)) if heldout else corpus.hold_back()


def _round_linears(
    checkpoint: Checkpoint, inputs: dict[str, InputRange]
) -> tuple[dict[str, QuantizedLinear], dict[str, dict[str, float]]]:
    """Every linear layer of the body in 4 bits, and what was lost in it."""
    linears, sites = {}, {}
    for name, weight_MK in checkpoint.linears.items():
        assert not isinstance(weight_MK, QuantizedLinear)  # the checkpoint has no scheme
        rounded, seen = round_to_nearest(weight_MK, f"{name}.weight"), inputs[name]
        linears[name] = QuantizedLinear(arithmetic.pack(rounded.codes), weight_MK.shape[1], rounded.scale, seen.scale)
        sites[name] = {
            "mse": rounded.mse,
            "clip_ratio": rounded.clip_ratio,
            "absmax": rounded.absmax,
            "input_mse": seen.mse,
            "input_clip_ratio": seen.clip_ratio,
            "input_absmax": seen.absmax,
            "input_excess_kurtosis": seen.excess_kurtosis,
        }
    return linears, sites


def _provenance(
    checkpoint: Checkpoint, scheme: Scheme, sites: dict[str, dict[str, float]], text: Corpus
) -> dict[str, Any]:
    """osp.json as far as it is known before quality is measured. How the source was trained is carried over."""
    carried = {key: checkpoint.provenance[key] for key in ("training",) if key in checkpoint.provenance}
    return {
        "format_version": format.FORMAT_VERSION,
        "tool_version": version("osp-runtime"),
        "tokenizer_sha256": format.sha256(checkpoint.path / "tokenizer.json"),
        **carried,
        "quantization": {
            "scheme": scheme.name,
            "sites": sites,
            "calibration": {"text": text.source, "sha256": text.sha256, "tokens": text.tokens},
        },
    }


def _quality(before: Perplexity, after: Perplexity, text: Corpus) -> dict[str, Any]:
    ratio = after.value / before.value
    warning = None
    if ratio > OUTLIER_SAFE_RATIO:
        warning = (
            f"this model is not outlier-safe: 4 bits take its perplexity from {before.value:.4g} to {after.value:.4g}; "
            "expect poor text from it"
        )
    quality = {
        "perplexity_16bit": before.value,
        "perplexity_w4a4": after.value,
        "ratio": ratio,
        "tokens": after.tokens,
        "text": text.source,
        "sha256": text.sha256,
    }
    return {"quality": quality, "warning": warning}


def _require_vacant(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory; name another, or remove it first")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A new directory beside `out` that takes its place on success; on failure nothing remains, made parents neither.

    Raises:
        OSError: no directory can be made there.
    """
    resolved = out.resolve()
    missing = [parent for parent in resolved.parents if not os.path.lexists(parent)]
    partial = resolved.with_name(f".{resolved.name}.{os.getpid()}.partial")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"{out} cannot be made: {error.strerror}") from error
        yield partial
        partial.rename(resolved)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:  # innermost first; one that holds something by now stays
            with suppress(OSError):
                parent.rmdir()
        raise
