"""A training run, from text to an exported model.

A run directory holds

    config.json      the settings of the run
    data/            tokenizer, token shards, documents for the quantizer (`data.py`)
    checkpoints/     step-N.pt, the newest few and the best (`checkpoints.py`)
    metrics.jsonl, outliers.jsonl, tensorboard/
                     what the run tells while it trains (`telemetry.py`)
    final/           the exported Hugging Face Llama
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.atomic_file import replace_json
from trainer.checkpoints import checkpoints
from trainer.config import ConfigError, TrainConfig
from trainer.data import TokenStreams, prepare
from trainer.evaluation import Evaluation
from trainer.export import export
from trainer.loop import Trainer
from trainer.optimizer import parameter_groups
from trainer.tokenizer import save_tokenizer


def train(
    paths: Sequence[str | os.PathLike[str]],
    directory: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quiet: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Trains a model on `paths` and exports it to `directory/final`; returns what osp.json says of the training.

    Processes that `torchrun` started share the run; they must see the same `directory`.

    Raises:
        TextError, DataError, ConfigError, TrainingError: see `data.prepare` and `Trainer.restore`; ConfigError also
            when `directory` holds a run already and `resume` is not set, or the other way round, and when the device or
            the package tensorboard is asked for and missing.
        TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
        TrainingStoppedError: SIGTERM came.
    """
    found = checkpoints(directory)
    if found and not resume:
        raise ConfigError(f"{directory} holds a run already; add --resume to continue it, or choose another --out")
    if resume and not found:
        raise ConfigError(f"{directory} holds no checkpoint to resume from")
    directory.mkdir(parents=True, exist_ok=True)
    with distributed.process_group(config.device):
        with distributed.process_0_first():
            opened = resume or distributed.rank() > 0
            streams = prepare(paths, directory / "data", config, resume=opened, tokenizer=tokenizer)
        return train_on(streams, directory, config, dtype=dtype, quiet=quiet, tensorboard=tensorboard)


def train_on(
    streams: TokenStreams,
    directory: Path,
    config: TrainConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quiet: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """As `train`, on data that is prepared already; goes on from the newest checkpoint in `directory`, if there is one.

    Raises as `train` does, but for ConfigError where there is a run already, or none.
    """
    trainer = Trainer.start(config, directory, streams)
    if found := checkpoints(directory):
        trainer.restore(found[-1])
    if distributed.rank() == 0:
        replace_json(directory / "config.json", config.to_dict())
    return _export(trainer, trainer.run(quiet, tensorboard=tensorboard), dtype)


def _export(trainer: Trainer, evaluation: Evaluation, dtype: torch.dtype) -> dict[str, Any]:
    config, streams = trainer.config, trainer.streams
    report = {
        "recipe": config.recipe,
        "steps": config.steps,
        "tokens_seen": config.steps * config.batch_tokens,
        "corpus_tokens": len(streams.train),
        "corpus_documents": streams.documents,
        "held_out_documents": streams.held_out_documents,
        "skipped_steps": trainer.guard.skipped,
        "parameters": {name: sum(p.numel() for p in group) for name, group in parameter_groups(trainer.model).items()},
        "settings": config.to_dict(),
        "device": str(trainer.compute),
        **{key: round(value, 6) for key, value in evaluation.summary().items()},
    }
    if distributed.rank() == 0:
        final = trainer.directory / "final"
        final.mkdir(exist_ok=True)
        save_tokenizer(streams.tokenizer, final, config.model.context_length)
        export(trainer.model.cpu(), final, report, streams.end_token_id, dtype)
    return report
