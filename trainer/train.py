"""The training loop: batches, schedule, evaluation, checkpoints, telemetry, and the export at the end.

A run directory holds

    config.json      the settings of the run
    data/            tokenizer, token streams, documents for the quantizer (`data.py`)
    checkpoints/     step-N.pt, the newest two
    metrics.jsonl    one line a logged step
    final/           the exported Hugging Face Llama
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from quant.format import write_json
from trainer import outliers
from trainer.config import CHANGEABLE, ConfigError, TrainConfig
from trainer.data import TokenStreams, held_out_windows, prepare, training_batch
from trainer.export import export
from trainer.model import OSPModel
from trainer.optimizer import learning_rate_share, make_optimizers, parameter_groups, set_learning_rate
from trainer.tokenizer import save_tokenizer

LOG_EVERY = 10
KEEP_CHECKPOINTS = 2
KURTOSIS_WINDOWS = 8
EVAL_ROWS = 8


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is safe."""


@dataclass(slots=True)
class Trainer:
    """One run's state. `step` counts finished optimizer steps; it is also the data cursor."""

    config: TrainConfig
    directory: Path
    streams: TokenStreams
    model: OSPModel
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    @classmethod
    def start(cls, config: TrainConfig, directory: Path, streams: TokenStreams) -> Trainer:
        """A fresh run."""
        torch.manual_seed(config.seed)
        model = OSPModel(config.model, config.recipe)
        return cls(config, directory, streams, model, make_optimizers(model, config))

    def run(self, quiet: bool = False) -> dict[str, float]:
        """Trains up to `config.steps`, with a progress bar on stderr unless `quiet`; returns the last evaluation."""
        config = self.config
        tokens_at_start, started = self.step * config.batch_tokens, time.monotonic()
        evaluation = self.evaluate()
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=True if quiet else None)
        with bar, (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as log:
            while self.step < config.steps:
                loss = self.train_step()
                bar.update()
                last = self.step == config.steps
                if self.step % config.eval_every == 0 or last:
                    evaluation = self.evaluate()
                if self.step % LOG_EVERY == 0 or last:
                    speed = (self.step * config.batch_tokens - tokens_at_start) / (time.monotonic() - started)
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, {speed:,.0f} tok/s, excess kurtosis {evaluation['excess_kurtosis']:.3g}"
                    )
                    log.write(json.dumps({"step": self.step, "loss": loss, "tokens_per_s": speed, **evaluation}) + "\n")
                    log.flush()
                if self.step % config.checkpoint_every == 0 or last:
                    self.save()
        return evaluation

    def train_step(self) -> float:
        """One optimizer step; returns the training loss (nats a token).

        Raises:
            TrainingError: the loss or the gradient norm is not finite; no parameter has been touched.
        """
        set_learning_rate(self.optimizers, learning_rate_share(self.step, self.config))
        windows_BL = training_batch(self.streams.train, self.config, self.step)
        loss = 0.0
        rows = max(1, self.config.micro_batch_tokens // self.config.model.context_length)
        for part_BL in torch.split(windows_BL, rows):
            share_loss = self._loss(part_BL) * (len(part_BL) / len(windows_BL))
            torch.autograd.backward(share_loss)
            loss += share_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm.item()}; no checkpoint is touched. Lower "
                f"--matrix-lr and --embedding-lr, and --resume if {self.directory / 'checkpoints'} holds one"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _loss(self, windows_BL: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.autocast):
            logits_BLV = self.model(windows_BL[:, :-1])
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), windows_BL[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`held_out_loss` (nats a token), and the residual stream's `excess_kurtosis` (block mean) and `absmax`."""
        self.model.eval()
        windows_BL = held_out_windows(self.streams.held_out, self.config.model.context_length, self.config.eval_tokens)
        batches = torch.split(windows_BL, EVAL_ROWS)
        total = sum(self._loss(batch).item() * batch.shape[0] for batch in batches)
        measured = outliers.residual_outliers(self.model, windows_BL[:KURTOSIS_WINDOWS, :-1])
        self.model.train()
        return {
            "held_out_loss": total / windows_BL.shape[0],
            "excess_kurtosis": sum(measured["excess_kurtosis"]) / len(measured["excess_kurtosis"]),
            "absmax": max(measured["absmax"]),
        }

    def save(self) -> None:
        """Writes a checkpoint beside the others, whole or not at all, and drops all but the newest."""
        folder = self.directory / "checkpoints"
        folder.mkdir(exist_ok=True)
        target, partial = folder / f"step-{self.step:08d}.pt", folder / "partial"
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
        for old in checkpoints(self.directory)[:-KEEP_CHECKPOINTS]:
            old.unlink()

    def restore(self, file: Path) -> None:
        """Continues from a checkpoint of the same settings, but for those that are `CHANGEABLE`.

        Raises:
            ConfigError: the checkpoint was made with other settings; the message names them.
            TrainingError: the file is damaged.
        """
        try:
            state = torch.load(file, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise TrainingError(f"{file} is damaged ({error}); remove it to resume from the one before") from None
        ours, theirs = self.config.to_dict(), state["config"]
        different = [key for key in ours if key not in CHANGEABLE and ours[key] != theirs.get(key)]
        if different:
            raise ConfigError(f"{file} was made with another {', '.join(different)}; give the same settings to resume")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["base_lr"] = peak
        self.step = state["step"]


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((directory / "checkpoints").glob("step-*.pt"))


def train(
    paths: Sequence[str | os.PathLike[str]],
    directory: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a model on `paths` and exports it to `directory/final`; returns what osp.json says of the training.

    Raises:
        TextError, DataError, ConfigError, TrainingError: see `data.prepare` and `Trainer.restore`; ConfigError also
            when `directory` holds a run already and `resume` is not set, or the other way round.
        TrainingError: the loss is no longer finite.
    """
    found = checkpoints(directory)
    if found and not resume:
        raise ConfigError(f"{directory} holds a run already; add --resume to continue it, or choose another --out")
    if resume and not found:
        raise ConfigError(f"{directory} holds no checkpoint to resume from")
    directory.mkdir(parents=True, exist_ok=True)
    streams = prepare(paths, directory / "data", config, resume=resume)
    trainer = Trainer.start(config, directory, streams)
    if resume:
        trainer.restore(found[-1])
    write_json(directory / "config.json", config.to_dict())
    return _export(trainer, trainer.run(quiet), dtype)


def _export(trainer: Trainer, evaluation: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    config, streams = trainer.config, trainer.streams
    final = trainer.directory / "final"
    final.mkdir(exist_ok=True)
    save_tokenizer(streams.tokenizer, final, config.model.context_length)
    report = {
        "recipe": config.recipe,
        "steps": config.steps,
        "tokens_seen": config.steps * config.batch_tokens,
        "corpus_tokens": len(streams.train),
        "corpus_documents": streams.documents,
        "held_out_documents": streams.held_out_documents,
        "parameters": {name: sum(p.numel() for p in group) for name, group in parameter_groups(trainer.model).items()},
        "settings": config.to_dict(),
        **{key: round(value, 6) for key, value in evaluation.items()},
    }
    export(trainer.model, final, report, streams.end_token_id, dtype)
    return report
