"""`osp train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from quant.text import TextError
from trainer.config import ConfigError, Recipe, preset
from trainer.options import preset_options


@click.command(short_help="Train an outlier-safe model and export it as a Hugging Face Llama.")
@preset_options
@click.option(
    "--data",
    "paths",
    multiple=True,
    help="A .txt or .md file (one document), a .jsonl file (a 'text' a line), a .parquet file (column 'text'), a "
    "directory of them, or hf:NAME[:CONFIG][@SPLIT], a dataset of the Hugging Face hub. Repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory; the model lands in OUT/final.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Directory of a tokenizer.json to use; none is trained."
)
@click.option("--recipe", type=click.Choice(get_args(Recipe)), help="Default osp; the others leave parts of it out.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="auto: a GPU if there is one.  [default: auto]"
)
@click.option("--compile", "compiled", is_flag=True, default=None, help="Run the model through torch.compile.")
@click.option(
    "--activation-checkpointing",
    is_flag=True,
    default=None,
    help="Keep only what enters each block, and compute the rest again: less memory, more work.",
)
@click.option("--deterministic", is_flag=True, default=None, help="The same bits in every run on a GPU too; slower.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps between two checkpoints.")
@click.option("--keep-checkpoints", type=click.IntRange(min=1), help="How many of the newest stay, beside the best.")
@click.option("--resume", is_flag=True, help="Continue the run in OUT from its last checkpoint.")
@click.option("--tensorboard", is_flag=True, help="Write OUT/tensorboard too.")
@click.option("--plan", is_flag=True, help="Say what the run would take, in memory and time, and stop.")
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="For --plan: sustained TFLOP/s of one device.  [default: measured]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def train(
    preset_name: str,
    paths: tuple[str, ...],
    out: Path | None,
    tokenizer: Path | None,
    recipe: str | None,
    threads: int | None,
    device: str | None,
    compiled: bool | None,
    activation_checkpointing: bool | None,
    deterministic: bool | None,
    dtype: str,
    checkpoint_every: int | None,
    keep_checkpoints: int | None,
    resume: bool,
    tensorboard: bool,
    plan: bool,
    tflops: float | None,
    as_json: bool,
    **changes: Any,
) -> None:
    """Trains a compact model on your text, outlier-safe by default, and exports it to OUT/final as a plain Llama.

    OUT/metrics.jsonl and OUT/outliers.jsonl grow while it trains, OUT/outliers.png shows the outliers in the end.
    """
    # Not at the top: `osp --help` shows this command too, and need not load torch for it.
    import torch

    from quant.llama import CheckpointError
    from trainer import distributed
    from trainer.checkpoints import TrainingError
    from trainer.compute import Compute
    from trainer.data import DataError
    from trainer.export import ExportError
    from trainer.guard import TrainingStoppedError
    from trainer.plan import format_plan, make_plan
    from trainer.telemetry import summary_writer_type
    from trainer.train import train as run_training

    if threads:
        torch.set_num_threads(threads)
    try:
        config = preset(
            preset_name,
            recipe=recipe,
            device=device,
            compile=compiled,
            activation_checkpointing=activation_checkpointing,
            deterministic=deterministic,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            **changes,
        )
        if plan:
            planned = make_plan(config, tflops)
            click.echo(json.dumps(planned) if as_json else format_plan(planned))
            return
        if not paths or out is None:
            raise click.UsageError("--data and --out are needed, unless --plan is given")
        # What is missing on this machine is said before the corpus is read.
        if tensorboard:
            summary_writer_type()
        compute = Compute.chosen(config)
        if not as_json and distributed.rank() == 0:
            click.echo(f"training on {compute}", err=True)
        report = run_training(
            paths,
            out,
            config,
            resume=resume,
            tokenizer=tokenizer,
            dtype=getattr(torch, dtype),
            quiet=as_json,
            tensorboard=tensorboard,
        )
    except TrainingStoppedError as stopped:
        if distributed.rank() == 0:
            click.echo(json.dumps({"stopped_at_step": stopped.step}) if as_json else f"{out}: {stopped}")
        return
    except (ConfigError, TextError, DataError, CheckpointError, TrainingError, ExportError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if distributed.rank() > 0:
        return
    _plot(out, f"{preset_name}, {config.recipe}")
    if as_json:
        click.echo(json.dumps({"checkpoint": str(out / "final"), **report}))
    else:
        click.echo(
            f"{out / 'final'}: held-out loss {report['held_out_loss']:.4f}, "
            f"excess kurtosis {report['excess_kurtosis']:.3g}, {report['tokens_seen']:,} tokens seen"
        )


def _plot(out: Path, title: str) -> None:
    from trainer.figure import PlotUnavailableError
    from trainer.outlier_plot import plot_outliers
    from trainer.telemetry import OUTLIERS_FILE

    try:
        plot_outliers(out / OUTLIERS_FILE, out / "outliers.png", title)
    except PlotUnavailableError as error:
        click.secho(f"note: {error}", err=True, fg="yellow")
