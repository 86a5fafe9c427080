"""`osp quantize`: the command, its options and its errors. torch is imported only when it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from quant.arithmetic import NonFiniteError
from quant.clip import ClipSearch
from quant.corpus import CALIBRATION_TOKENS
from quant.histogram import PercentileError
from quant.llama import CheckpointError
from quant.partial import OtherRunError
from quant.report import OUTLIER_SAFE_RATIO, NotOutlierSafeError, table
from quant.scheme import HADAMARDS, SCHEMES, Scheme, SchemeError, named, read_scheme
from quant.text import TextError

TEXT = click.Path(path_type=Path)
BITS = click.Choice(["16", "8", "4"])

USER_ERRORS = (
    CheckpointError,
    NonFiniteError,
    NotOutlierSafeError,
    OSError,
    OtherRunError,
    PercentileError,
    SchemeError,
    TextError,
)


def _parse_clip(_ctx: click.Context, _param: click.Parameter, value: str) -> ClipSearch:
    try:
        return ClipSearch.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _parse_ratio(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which no range excludes
        raise click.BadParameter("nan is not a number that a ratio can be compared with")
    return value


@click.command(short_help="Turn a Hugging Face Llama into a 4-bit checkpoint.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--scheme", default="w4a4", show_default=True, help=f"What to quantize: {', '.join(SCHEMES)}, or a YAML file."
)
@click.option(
    "--weights",
    type=click.Choice(["rtn", "gptq"]),
    default="rtn",
    show_default=True,
    help="How weights are rounded: to nearest, or so that their errors make up for each other.",
)
@click.option("--hadamard", type=click.Choice(HADAMARDS), help="Rotate outliers away.  [default: as the scheme says]")
@click.option("--kv", type=BITS, help="Bits of keys and values in the cache.  [default: as the scheme says]")
@click.option("--head", type=BITS, help="Bits of the head.  [default: as the scheme says]")
@click.option("--embedding", type=BITS, help="Bits of the embedding.  [default: as the scheme says]")
@click.option(
    "--clip",
    callback=_parse_clip,
    default="mse",
    metavar="mse|pNORM|PERCENT",
    show_default=True,
    help="What scales are searched for: mse, the mean of another power of the error (p2.4), or, for activations, to "
    "hold so many percent of the values (99.99).",
)
@click.option(
    "--calibration", type=TEXT, multiple=True, help="Text for activation ranges: .txt, .md, .jsonl, directory."
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=2),
    default=CALIBRATION_TOKENS,
    show_default=True,
    help="Read no more of it.",
)
@click.option("--eval", "heldout", type=TEXT, multiple=True, help="Text to measure perplexity on, before and after.")
@click.option(
    "--max-ratio",
    callback=_parse_ratio,
    type=click.FloatRange(min=0),
    default=OUTLIER_SAFE_RATIO,
    show_default=True,
    help="By which perplexity may grow before the model is said not to be outlier-safe.",
)
@click.option("--tune-steps", type=click.IntRange(min=0), default=0, help="Tune the model for its scheme first.")
@click.option("--data", type=TEXT, multiple=True, help="Text to tune on, of the kind that the model was trained on.")
@click.option(
    "--tune-lr", type=float, help="Muon's learning rate in tuning: about a fifth of the training's.  [default: 6e-4]"
)
@click.option("--save-tuned", type=TEXT, help="Directory to leave the tuned 16-bit checkpoint in.")
@click.option("--strict", is_flag=True, help="A model that is not outlier-safe is an error; nothing is written.")
@click.option("--resume", is_flag=True, help="Go on after the last layer that an interrupted run has finished.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def quantize(
    checkpoint: Path,
    out: Path,
    scheme: str,
    hadamard: str | None,
    kv: str | None,
    head: str | None,
    embedding: str | None,
    tune_steps: int,
    data: tuple[Path, ...],
    tune_lr: float | None,
    save_tuned: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn the Hugging Face Llama directory CHECKPOINT into a 4-bit checkpoint.

    Without --calibration a bundled English text is used. Without --eval the last fifth of the calibration text is
    held back to measure perplexity on.
    """
    from quant.convert import quantize_checkpoint
    from quant.finish import tune_and_quantize
    from quant.tune_settings import TuneSettings, TuningError

    if bool(tune_steps) != bool(data):
        raise click.UsageError("--tune-steps and --data go together: how long to tune, and on what")
    if not tune_steps and (tune_lr is not None or save_tuned is not None):
        raise click.UsageError("--tune-lr and --save-tuned say nothing without --tune-steps")
    settings["progress"] = not as_json
    try:
        chosen = choose_scheme(scheme, hadamard=hadamard, kv=kv, head=head, embedding=embedding)
        if tune_steps:
            tuning = TuneSettings(tune_steps) if tune_lr is None else TuneSettings.with_rate(tune_steps, tune_lr)
            report = tune_and_quantize(checkpoint, out, chosen, data, tuning, save_tuned=save_tuned, **settings)
        else:
            report = quantize_checkpoint(checkpoint, out, chosen, **settings)
    except (*USER_ERRORS, TuningError) as error:
        raise click.ClickException("; ".join([str(error), *getattr(error, "__notes__", [])])) from error
    except KeyboardInterrupt as error:
        for note in getattr(error, "__notes__", []):
            click.echo(note, err=True)
        raise
    show(out, report, as_json)


def choose_scheme(
    scheme: str, *, hadamard: str | None, kv: str | None, head: str | None, embedding: str | None
) -> Scheme:
    """The scheme of a name or a YAML file, with the settings that were given on the command line.

    Raises:
        SchemeError: there is none, or it makes no sense.
    """
    start = read_scheme(scheme) if scheme.endswith((".yaml", ".yml")) else named(scheme)
    bits = {"kv_bits": kv, "head": head, "embedding_bits": embedding}
    changes: dict[str, Any] = {key: int(value) for key, value in bits.items() if value is not None}
    return start.changed(**changes, **({} if hadamard is None else {"hadamard": hadamard}))


def show(out: Path, report: dict[str, Any], as_json: bool) -> None:
    """Prints a report; what a user should not miss goes to stderr."""
    click.echo(json.dumps({"out": str(out), **report}) if as_json else f"{table(report)}\nwrote {out}")
    for note in report["quantization"]["notes"]:
        click.secho(f"note: {note}", err=True, fg="yellow")
    if report["warning"]:
        click.secho(f"WARNING: {report['warning']}", err=True, fg="red", bold=True)
