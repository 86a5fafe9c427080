"""Tuning and quantization in one go: round a model, tune it for that, round the result by its learned scales."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.convert import quantize_checkpoint
from quant.directories import require_vacant
from quant.format import read_provenance
from quant.scheme import Scheme
from quant.tuning import TuneSettings, tune


def tune_and_quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scheme: Scheme,
    data: Sequence[str | os.PathLike[str]],
    settings: TuneSettings,
    *,
    save_tuned: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: bool = False,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Tunes `source` for `scheme` and quantizes the result into the directory `out`.

    Unfinished work lies in `.OUT.tuning` beside `out`, and goes when all is done.

    Args:
        data: text to tune on.
        save_tuned: directory to leave the tuned 16-bit checkpoint in.
        options: the other arguments of `quantize_checkpoint`.

    Returns:
        As `quantize_checkpoint`, with quality measured against the untuned model, and "tuning" from `tune`.

    Raises:
        FileExistsError: `out` or `save_tuned` is not vacant, or unfinished work is there and `resume` is not set.
        As `quantize_checkpoint` and `tune`.
    """
    source, out = Path(source), Path(out)
    for directory in (out, save_tuned):
        if directory is not None:
            require_vacant(Path(directory))
    work = out.resolve().with_name(f".{out.resolve().name}.tuning")
    if work.exists() and not resume:
        raise FileExistsError(f"{work} holds an unfinished tuning: go on with --resume, or remove it to start anew")
    start, tuned = work / "start", work / "tuned"
    if not start.exists():
        quantize_checkpoint(source, start, scheme, progress=progress, resume=resume, **options)
    if not (tuned / "osp.json").exists():
        tune(source, start, tuned, data, settings, progress=progress, resume=resume)
    untuned = read_provenance(start)["quality"]
    report = quantize_checkpoint(
        tuned, out, scheme, strict=strict, progress=progress, resume=resume, untuned=untuned, **options
    )
    if save_tuned is not None:
        shutil.rmtree(save_tuned, ignore_errors=True)  # an empty directory may be there
        shutil.move(tuned, save_tuned)
    shutil.rmtree(work)
    return report
