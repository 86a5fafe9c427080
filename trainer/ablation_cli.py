"""`osp ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quant.cli import USER_ERRORS
from trainer.config import ConfigError, preset
from trainer.options import preset_options


@click.command(short_help="Train the paper's six recipes and compare their outliers, and them in 4 bits.")
@preset_options
@click.option("--data", "paths", multiple=True, required=True, help="Text, as `osp train` takes it. Repeatable.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of the runs.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def ablate(
    preset_name: str,
    paths: tuple[str, ...],
    out: Path,
    threads: int | None,
    as_json: bool,
    **changes: Any,
) -> None:
    """Trains Adam, Muon alone, Muon, Muon with SSNorm, Muon with embedding projections, and OSP, from one seed on the
    same batches; quantizes each to 4-4-4 (weights, activations, KV cache) with and without FFN Hadamard.

    OUT/ablation.json and OUT/ablation.md have the outcome so far after each recipe, OUT/ablation.png shows it in the
    end. The same command goes on with what is not finished.
    """
    # Not at the top: `osp --help` shows this command too, and need not load torch for it.
    import torch

    from trainer import distributed
    from trainer.ablation import Ablation
    from trainer.ablation_report import as_markdown, plot
    from trainer.checkpoints import TrainingError
    from trainer.data import DataError
    from trainer.export import ExportError
    from trainer.figure import PlotUnavailableError
    from trainer.guard import TrainingStoppedError

    if distributed.world_size() > 1:
        raise click.ClickException("osp ablate trains in one process; torchrun shares a single run, of osp train")
    if threads:
        torch.set_num_threads(threads)
    try:
        ablation = Ablation(paths, out, preset(preset_name, **changes))
        result = ablation.run(quiet=as_json)
    except TrainingStoppedError as stopped:
        note = f"{out}: stopped after step {stopped.step} of a training, which is saved; the same command goes on"
        click.echo(json.dumps({"stopped_at_step": stopped.step}) if as_json else note)
        return
    except (*USER_ERRORS, ConfigError, DataError, TrainingError, ExportError) as error:
        raise click.ClickException("; ".join([str(error), *getattr(error, "__notes__", [])])) from error
    try:
        plot(result, out / "ablation.png")
    except PlotUnavailableError as error:
        click.secho(f"note: {error}", err=True, fg="yellow")
    click.echo(json.dumps(result) if as_json else f"{as_markdown(result)}\nwrote {out}")
