"""`osp quantize`: the command, its table and its errors. torch is imported only when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quant.arithmetic import NonFiniteError
from quant.llama import CheckpointError
from quant.scheme import SCHEMES, SchemeError, named
from quant.text import TextError

TEXT = click.Path(path_type=Path)


@click.command(short_help="Turn a Hugging Face Llama into a 4-bit checkpoint.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option("--scheme", default="w4a4", show_default=True, help=f"What to quantize: {', '.join(SCHEMES)}.")
@click.option(
    "--calibration", type=TEXT, multiple=True, help="Text for activation ranges: .txt, .md, .jsonl, directory."
)
@click.option("--eval", "heldout", type=TEXT, multiple=True, help="Text to measure perplexity on, before and after.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def quantize(
    checkpoint: Path, out: Path, scheme: str, calibration: tuple[Path, ...], heldout: tuple[Path, ...], as_json: bool
) -> None:
    """Turn the Hugging Face Llama directory CHECKPOINT into a 4-bit checkpoint.

    Without --calibration a bundled English text is used. Without --eval the last fifth of the calibration text is
    held back to measure perplexity on.
    """
    from quant.convert import quantize_checkpoint

    try:
        report = quantize_checkpoint(
            checkpoint, out, named(scheme), calibration=calibration, heldout=heldout, progress=not as_json
        )
    except (CheckpointError, TextError, SchemeError, NonFiniteError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"out": str(out), **report}) if as_json else _table(out, report))
    if report["warning"]:
        click.secho(f"WARNING: {report['warning']}", err=True, fg="red", bold=True)


def _table(out: Path, report: dict[str, Any]) -> str:
    """A line for every linear layer, then where the checkpoint is and how good."""
    sites, quality = report["quantization"]["sites"], report["quality"]
    calibration = report["quantization"]["calibration"]
    width = max(map(len, sites))
    lines = [f"{'layer':{width}}  {'weight':^29}  {'input':^29}"]
    lines += [f"{'':{width}}  {'mse':>9} {'clip':>8} {'absmax':>10}  {'kurtosis':>9} {'clip':>8} {'absmax':>10}"]
    for name, site in sites.items():
        lines.append(
            f"{name:{width}}  {site['mse']:9.2e} {site['clip_ratio']:8.3f} {site['absmax']:10.4g}"
            f"  {site['input_excess_kurtosis']:9.2f} {site['input_clip_ratio']:8.3f} {site['input_absmax']:10.4g}"
        )
    lines += [
        "",
        f"calibrated on {calibration['tokens']:,} tokens ({_named(calibration['text'])})",
        f"perplexity {quality['perplexity_16bit']:.4g} -> {quality['perplexity_w4a4']:.4g} (x {quality['ratio']:.4f}) "
        f"on {quality['tokens']:,} tokens ({_named(quality['text'])})",
        f"wrote {out}",
    ]
    return "\n".join(lines)


def _named(text: str | list[str]) -> str:
    return text if isinstance(text, str) else ", ".join(text)
