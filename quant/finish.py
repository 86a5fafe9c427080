"""Tuning and quantization in one go: round a model, tune it for that, round the result by its learned scales."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.convert import quantize_checkpoint
from quant.directories import require_vacant
from quant.files import write_json
from quant.format import read_provenance
from quant.partial import RUN_FILE, file_identity, require_same, source_files
from quant.scheme import Scheme
from quant.tune_settings import TuneSettings
from quant.tuning import require_tunable, tune
from quant.tuning_text import TuningText


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
        FileExistsError: `out` or `save_tuned` is not vacant, one lies in the other, or unfinished work is there and
            `resume` is not set.
        OtherRunError: the work to resume was begun with something else.
        As `quantize_checkpoint` and `tune`. Once there is work to go on with, an error has a note that says how.
    """
    source, out = Path(source), Path(out)
    target = _place_for(save_tuned, out)
    require_vacant(out)
    require_tunable(scheme)
    work = out.resolve().with_name(f".{out.resolve().name}.tuning")
    if work.exists() and not resume:
        raise FileExistsError(f"{work} holds an unfinished tuning: go on with --resume, or remove it to start anew")
    text = TuningText.for_model(source, data, settings.longest_window, settings.seed)
    _begin(work, _begun_with(source, scheme, settings, text, options))
    start, tuned = work / "start", work / "tuned"
    try:
        if not start.exists():
            quantize_checkpoint(source, start, scheme, progress=progress, resume=resume, **options)
        if not (tuned / "osp.json").exists():
            tune(source, start, tuned, text, settings, progress=progress, resume=resume)
        report = quantize_checkpoint(
            tuned,
            out,
            scheme,
            strict=strict,
            progress=progress,
            resume=resume,
            untuned=read_provenance(start)["quality"],
            **options,
        )
    except BaseException as error:
        error.add_note(f"what is done lies in {work}: go on with --resume, or remove it to start anew")
        raise
    if target is not None:
        target.rmdir()
        shutil.move(tuned, target)
    shutil.rmtree(work)
    return report


def _place_for(save_tuned: str | os.PathLike[str] | None, out: Path) -> Path | None:
    """An empty directory, made now, so that a place where nothing can be written costs no work."""
    if save_tuned is None:
        return None
    target = Path(save_tuned)
    one, other = target.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise FileExistsError(f"{target} and {out} lie in one another; name two directories side by side")
    require_vacant(target)
    target.mkdir(parents=True, exist_ok=True)
    return target


def _begun_with(
    source: Path, scheme: Scheme, settings: TuneSettings, text: TuningText, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that determines the result, by names for an error."""
    texts = [Path(path) for key in ("calibration", "heldout") for path in options.get(key, ())]
    return {
        "source or text files": {str(file): file_identity(file) for file in (*source_files(source), *texts)},
        "scheme": scheme.to_dict(),
        "tuning": asdict(settings),
        "tuning text": text.sha256,
        "options": {key: str(value) for key, value in sorted(options.items())},
    }


def _begin(work: Path, begun_with: Mapping[str, Any]) -> None:
    """Records what the work is begun with, or compares it with what was recorded."""
    if (work / RUN_FILE).exists():
        require_same(work, begun_with)
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / RUN_FILE, begun_with)
