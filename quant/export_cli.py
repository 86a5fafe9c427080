"""`osp export`: the command, its words and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quant.export import ACTIVATIONS, FORMATS, export_checkpoint
from quant.llama import CheckpointError


def _check_format(_ctx: click.Context, _param: click.Parameter, value: str) -> None:
    if value == "onnx":
        raise click.BadParameter(f"this release has no ONNX export yet; there is: {', '.join(FORMATS)}")
    if value not in FORMATS:
        raise click.BadParameter(f"unknown format {value!r}; there is: {', '.join(FORMATS)}")


@click.command(short_help="Write a 4-bit checkpoint for transformers and vLLM.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--format", required=True, callback=_check_format, expose_value=False, help=f"There is: {', '.join(FORMATS)}."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="none",
    show_default=True,
    help="none: inputs keep 16 bits (W4A16). token: the bits of the scheme, one scale a token (W4A4).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def export(model: Path, out: Path, activations: str, as_json: bool) -> None:
    """Write the quantized checkpoint in the directory MODEL as stock engines load it.

    A checkpoint that they would compute wrongly is refused; the message says how to quantize instead.
    """
    try:
        report = export_checkpoint(model, out, activations=activations)
    except (CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"out": str(out), **report}) if as_json else _as_text(out, report))


def _as_text(out: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{group['weight_bits']}-bit weights, {group['input_bits']}-bit inputs: {', '.join(group['sites'])}"
        for group in report["groups"]
    ]
    lines.append(f"16 bits: {', '.join([*report['sixteen_bit'], 'embedding'])}")
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"wrote {out}: {report['format']}, {report['bytes']:,} bytes of weights"])
