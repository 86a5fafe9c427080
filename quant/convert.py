"""The pipeline: a Hugging Face Llama checkpoint in, a quantized one with its measured quality out.

Of the weights, one layer is in memory at a time. Each layer that is done is kept in a partial directory, from which an
interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quant import format
from quant.arithmetic import NonFiniteError
from quant.calibrate import Calibration, InputStatistics
from quant.clip import ClipSearch
from quant.corpus import CALIBRATION_TOKENS, Corpus, read_corpus
from quant.directories import copy_companions
from quant.files import read_json
from quant.format import CheckpointReader
from quant.layers import LayerQuantizer
from quant.llama import EMBEDDING, HEAD, CheckpointError
from quant.model import WeightSource, build_block, build_norm
from quant.partial import PartialRun, file_identity, partial_run, source_files
from quant.perplexity import measure_perplexity
from quant.report import OUTLIER_SAFE_RATIO, NotOutlierSafeError, warning
from quant.rotation import RotatedSource
from quant.scheme import Scheme
from quant.stream import HiddenStates
from quant.tensors import Tensor
from quant.text import Perplexity
from quant.tokenizer import read_tokenizer
from quant.tuned_scales import SCALES_FILE, differing_settings, read_scales, tuned_scheme

CALIBRATION_WINDOW = 2048
"""Calibration windows are no longer, whatever the model's context: a layer's activations are in memory for one."""

TABLES = "tables"
CARRIED = ("training", "tuning")
"""What the source's osp.json says of how the weights came to be goes along."""

PathLike = str | os.PathLike[str]


def quantize_checkpoint(
    source: PathLike,
    out: PathLike,
    scheme: Scheme,
    *,
    weights: str = "rtn",
    calibration: Sequence[PathLike] = (),
    calibration_tokens: int = CALIBRATION_TOKENS,
    heldout: Sequence[PathLike] = (),
    clip: ClipSearch = ClipSearch(),  # noqa: B008 - immutable
    strict: bool = False,
    max_ratio: float = OUTLIER_SAFE_RATIO,
    progress: bool = False,
    resume: bool = False,
    untuned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantizes the checkpoint at `source` into the directory `out`, which appears whole or not at all.

    Learned scales beside the source (`quant.tuned_scales`) are used if they are for `scheme`; else scales are searched.

    Args:
        weights: how those of the blocks are rounded: "rtn" (to nearest) or "gptq".
        calibration: text files or directories for static scales and GPTQ; none means the bundled text.
        calibration_tokens: reading stops after so many.
        heldout: text to measure perplexity on; none means the last fifth of the calibration text, which is then
            not calibrated on.
        clip: how scales are searched.
        strict: a model that does not survive is an error, and `out` does not appear.
        max_ratio: by which perplexity may grow before the model counts as one that does not survive.
        progress: bars on stderr where that is a terminal.
        resume: goes on after the last layer that an interrupted run has finished, if there is one.
        untuned: of a tuned source, the "quality" of what it was before: quality is then measured against that.

    Returns:
        What osp.json records: scheme, errors of every site, hashes of the texts, perplexity before and after.
        "warning" is a sentence where the model does not survive, else None.

    Raises:
        FileExistsError: `out` exists and is not an empty directory, or an interrupted run is there to resume.
        OSError: `out` cannot be made.
        OtherRunError: the run to resume was made from something else.
        CheckpointError: `source` is not a usable full-precision checkpoint.
        SchemeError: `scheme` makes no sense for this model.
        ValueError: `weights` is neither of the two.
        TextError: a text cannot be read or is too short.
        PercentileError: `clip` names a percentile that is zero in an input; the message names it and the percentile.
        NonFiniteError: a weight, an activation or the source's perplexity is NaN or infinite; the message names it.
        NotOutlierSafeError: the model does not survive, and `strict` is set.
        Once a layer is finished, an error of any kind has a note that says how to go on.
    """
    if weights not in ("rtn", "gptq"):
        raise ValueError(f"{weights!r} is no way to round weights; known: rtn, gptq")
    source, out = Path(source), Path(out)
    with partial_run(out, resume=resume) as run:  # first, so that a place where nothing can be written costs no work
        reader = CheckpointReader(source)
        if reader.scheme is not None:
            raise CheckpointError(source, f"is quantized already ({reader.scheme.label}); start from full precision")
        reader.config.check_scheme(scheme)
        plan = Calibration(scheme, clip, hessians=weights == "gptq", scales=read_scales(reader, scheme) or {})
        calibration_text, heldout_text = _read_texts(reader, plan, calibration, calibration_tokens, heldout)
        context = reader.config.max_position_embeddings
        windows = calibration_text.windows(min(context, CALIBRATION_WINDOW)) if calibration_text else []
        heldout_windows = heldout_text.windows(context)
        run.begin(_made_from(reader, plan, windows))

        view: WeightSource = RotatedSource(reader) if scheme.hadamard == "full" else reader
        _quantize_parts(view, plan, windows, run, progress)
        report = _write(reader, view, plan, calibration_text, run)
        before = measure_perplexity(reader, heldout_windows, progress="perplexity before" if progress else None)
        after = _perplexity_after(run.checkpoint, heldout_windows, progress)
        quality = _quality(before, after, heldout_text, untuned)
        sites = report["quantization"]["sites"]
        report |= {"quality": quality, "warning": warning(scheme, weights, reader.config, sites, quality, max_ratio)}
        format.write_json(run.checkpoint / "osp.json", report)
        if strict and report["warning"]:
            raise NotOutlierSafeError(report["warning"])
    return report


def _read_texts(
    reader: CheckpointReader,
    plan: Calibration,
    calibration: Sequence[PathLike],
    calibration_tokens: int,
    heldout: Sequence[PathLike],
) -> tuple[Corpus | None, Corpus]:
    """The text to calibrate on, where that is needed, and the text to measure on. One that was named is read even
    where it is not needed, so that a name that is wrong is told."""
    tokenizer = read_tokenizer(reader.path)
    if heldout and not calibration and not plan.needs_text:
        return None, read_corpus(heldout, tokenizer)
    corpus = read_corpus(calibration, tokenizer, limit=calibration_tokens)
    kept, held = (corpus, read_corpus(heldout, tokenizer)) if heldout else corpus.hold_back()
    return (kept if plan.needs_text else None), held


def _made_from(reader: CheckpointReader, plan: Calibration, windows: list[list[int]]) -> dict[str, Any]:
    """All that determines the parts of a run, by names for an error."""
    return {
        "tool version": version("osp-runtime"),
        "source files": {file.name: file_identity(file) for file in source_files(reader.path)},
        "scheme": plan.scheme.to_dict(),
        "--weights": plan.weights_method,
        "--clip": str(plan.clip),
        "calibration text": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
    }


def _quantize_parts(
    view: WeightSource, plan: Calibration, windows: list[list[int]], run: PartialRun, progress: bool
) -> None:
    """Makes the parts of the run that are not finished: every layer, then the tables."""
    quantizer, finished = LayerQuantizer(view, plan, progress), run.finished()
    layers = [f"layer-{layer:05}" for layer in range(view.config.num_hidden_layers)]
    if set(finished) >= {*layers, TABLES}:
        return
    hidden = HiddenStates(view, windows) if plan.needs_text else None
    bar = tqdm(layers, "calibrating" if hidden else "rounding", unit="layer", disable=None if progress else True)
    for layer, part in enumerate(bar):
        seen: dict[str, InputStatistics] = {}
        if hidden is not None:
            block = build_block(view, hidden.config, layer)
            if part in finished:
                hidden.advance(block)
            else:
                seen = plan.observe_block(hidden, block, layer)
            del block  # before its weights are read once more
        if part not in finished:
            run.save(part, *quantizer.layer(layer, seen))
    if TABLES not in finished:
        head_input = plan.observe_head(hidden, build_norm(view)) if hidden and plan.scheme.head.static else None
        run.save(TABLES, *quantizer.tables(head_input))


def _write(
    reader: CheckpointReader, view: WeightSource, plan: Calibration, text: Corpus | None, run: PartialRun
) -> dict[str, Any]:
    """Joins the parts into a checkpoint; osp.json as far as it is known before quality is measured."""
    tensors: dict[str, Tensor] = {}
    sites: dict[str, dict[str, Any]] = {}
    for part in run.finished():  # layers in their order, then the tables
        part_tensors, part_sites = run.load(part)
        tensors |= part_tensors
        sites |= part_sites
    report = {
        "format_version": format.FORMAT_VERSION,
        "tool_version": version("osp-runtime"),
        "tokenizer_sha256": format.sha256(reader.path / "tokenizer.json"),
        **{key: reader.provenance[key] for key in CARRIED if key in reader.provenance},
        "quantization": {
            "scheme": plan.scheme.label,
            "settings": plan.scheme.to_dict(),
            "weights": plan.weights_method,
            "clip": str(plan.clip),
            "scales": "learned" if plan.scales else "searched",
            "sites": sites,
            "calibration": text
            and {"text": text.source, "sha256": text.sha256, "tokens": text.tokens, "cut": text.cut},
            "bytes": _sizes(tensors),
            "notes": _notes(reader, plan, sites),
        },
    }
    config_json = read_json(reader.path, "config.json", "")
    config_json["tie_word_embeddings"] = view.config.tie_word_embeddings  # a full rotation unties the head
    copy_companions(reader.path, run.checkpoint)
    format.write_quantized(run.checkpoint, config_json, plan.scheme, tensors, report)
    return report


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the tensors of each kind of module."""
    sizes = {"body": 0, "head": 0, "embedding": 0, "norms": 0}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        kind = {EMBEDDING: "embedding", HEAD: "head"}.get(module, "norms" if module.endswith("norm") else "body")
        sizes[kind] += tensor.nbytes
    return sizes


def _notes(reader: CheckpointReader, plan: Calibration, sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was done otherwise than one might expect."""
    notes = [
        f"{name}: GPTQ cannot use the Hessian of its inputs; rounded to nearest"
        for name, site in sites.items()
        if plan.hessians and site["method"] == "rtn" and name not in (EMBEDDING, HEAD)
    ]
    if plan.hessians and plan.scales:
        notes.append(
            "the scales are those that were tuned, but the codes are GPTQ's, not those that the model was tuned with; "
            "--weights rtn gives these"
        )
    tuned = tuned_scheme(reader)
    if tuned is not None and not plan.scales:
        differing = ", ".join(differing_settings(tuned, plan.scheme))
        notes.append(f"{SCALES_FILE} is for another scheme ({tuned.label}; it differs in {differing}): scales searched")
    return notes


def _perplexity_after(checkpoint: Path, windows: list[list[int]], progress: bool) -> Perplexity | None:
    """Of what was written, so that a fault in writing cannot hide; None where it is not finite."""
    try:
        return measure_perplexity(
            CheckpointReader(checkpoint), windows, progress="perplexity after" if progress else None
        )
    except NonFiniteError:
        return None


def _quality(
    before: Perplexity, after: Perplexity | None, text: Corpus, untuned: Mapping[str, Any] | None
) -> dict[str, Any]:
    full = before.value if untuned is None else untuned["perplexity_16bit"]
    quality = {"perplexity_16bit": full, "perplexity": after and after.value, "ratio": after and after.value / full}
    if untuned is not None:
        quality |= {"perplexity_16bit_tuned": before.value, "perplexity_untuned": untuned["perplexity"]}
    return {**quality, "tokens": before.tokens, "text": text.source, "sha256": text.sha256}
