"""`osp export`: the command, its words and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quant.export import ACTIVATIONS, export_checkpoint
from quant.export import FORMATS as STOCK_FORMATS
from quant.llama import CheckpointError
from quant.onnx_directory import CACHE_TYPES
from quant.onnx_directory import FORMAT as ONNX

FORMATS = (*STOCK_FORMATS, ONNX)


def _check_format(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if value not in FORMATS:
        raise click.BadParameter(f"unknown format {value!r}; there is: {', '.join(FORMATS)}")
    return value


@click.command(short_help="Write a checkpoint for transformers and vLLM, or for ONNX Runtime.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--format", "form", required=True, callback=_check_format, help=f"There is: {', '.join(FORMATS)}.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="none",
    show_default=True,
    help="compressed-tensors. none: inputs keep 16 bits (W4A16). token: the bits of the scheme, one scale a token "
    "(W4A4).",
)
@click.option(
    "--device",
    type=click.Choice(list(CACHE_TYPES)),
    help="onnx. What the graph is for: cpu (the default), or cuda, whose products are others and whose attention is in "
    "float16.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def export(model: Path, form: str, out: Path, activations: str, device: str | None, as_json: bool) -> None:
    """Write the checkpoint in the directory MODEL as other engines load it.

    compressed-tensors: a quantized one, as transformers and vLLM load it. One that they would compute wrongly is
    refused; the message says how to quantize instead.

    onnx: any, as a graph for ONNX Runtime, with the integers of its scheme; `osp serve --engine onnx` serves it.
    """
    try:
        if form == ONNX:
            report = _export_onnx(model, out, activations, device)
        elif device is not None:
            raise click.UsageError("--device is of --format onnx")
        else:
            report = export_checkpoint(model, out, activations=activations)
    except (CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"out": str(out), **report}) if as_json else _as_text(out, report))


def _export_onnx(model: Path, out: Path, activations: str, device: str | None) -> dict[str, Any]:
    if activations != "none":
        raise click.UsageError("--activations is of --format compressed-tensors; ONNX has the scheme's own")
    from quant.export_onnx import export_onnx  # onnx is an extra

    return export_onnx(model, out, device or "cpu")


def _as_text(out: Path, report: dict[str, Any]) -> str:
    if report["format"] == ONNX:
        lines = [f"precision: {report['precision']}"]
    else:
        lines = [
            f"{group['weight_bits']}-bit weights, {group['input_bits']}-bit inputs: {', '.join(group['sites'])}"
            for group in report["groups"]
        ]
        lines.append(f"16 bits: {', '.join([*report['sixteen_bit'], 'embedding'])}")
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"wrote {out}: {report['format']}, {report['bytes']:,} bytes of weights"])
