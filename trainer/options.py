"""The command line's options that change a preset: the same for `osp train` and `osp ablate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from trainer.config import PRESETS

COUNT = click.IntRange(min=1)

OPTIONS = (
    click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="demo", show_default=True),
    click.option("--steps", type=COUNT, help="Optimizer steps."),
    click.option("--batch-tokens", type=COUNT, help="Tokens an optimizer step; whole contexts."),
    click.option("--micro-batch-tokens", type=COUNT, help="Of these, how many go through the model at a time."),
    click.option("--matrix-lr", type=float, help="Peak learning rate of the matrices."),
    click.option("--embedding-lr", type=float, help="Peak learning rate of embedding, head and norms."),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of initialization and data order."),
    click.option("--vocab-size", type=COUNT, help="Tokens of the vocabulary."),
    click.option("--hidden-size", type=COUNT, help="Width of the residual stream."),
    click.option("--intermediate-size", type=COUNT, help="Width within the FFN."),
    click.option("--num-layers", type=COUNT, help="Blocks."),
    click.option("--num-heads", type=COUNT, help="Attention heads."),
    click.option("--context-length", type=COUNT, help="Tokens of a sequence, at most."),
)


def preset_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `OPTIONS` to a command, which gets `preset_name`, and the others as `config.preset` names its changes."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
