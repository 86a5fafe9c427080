"""The training loop: batches, schedule, evaluation, checkpoints, telemetry, and the export at the end.

A run directory holds

    config.json      the settings of the run
    data/            tokenizer, token shards, documents for the quantizer (`data.py`)
    checkpoints/     step-N.pt, the newest few and the best (`checkpoints.py`)
    metrics.jsonl    one line a logged step
    final/           the exported Hugging Face Llama
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from trainer import distributed
from trainer.atomic_file import replace_json, replacing
from trainer.checkpoints import (
    TrainingError,
    checkpoints,
    drop_old,
    random_state,
    read_checkpoint,
    seed_generators,
    set_random_state,
    write_checkpoint,
)
from trainer.config import ConfigError, TrainConfig
from trainer.data import TokenStreams, held_out_windows, prepare, training_batch, window_starts
from trainer.export import export
from trainer.guard import StepGuard, TrainingStoppedError, first_bad_parameter, stop_requests
from trainer.model import OSPModel
from trainer.optimizer import learning_rate_share, make_optimizers, parameter_groups, set_learning_rate
from trainer.outliers import measure_outliers
from trainer.tokenizer import save_tokenizer

__all__ = ["Trainer", "TrainingError", "TrainingStoppedError", "checkpoints", "train"]

LOG_EVERY = 10
KURTOSIS_WINDOWS = 8
EVAL_ROWS = 8


@dataclass(slots=True)
class Trainer:
    """One run's state.

    Attributes:
        step: finished optimizer steps, skipped ones too; it is also the data cursor.
        best: step and held-out loss of the best checkpoint so far.
        replica: `model` as training calls it, so that gradients are those of all processes of the run.
    """

    config: TrainConfig
    directory: Path
    streams: TokenStreams
    model: OSPModel
    optimizers: list[torch.optim.Optimizer]
    guard: StepGuard
    replica: nn.Module
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: TrainConfig, directory: Path, streams: TokenStreams) -> Trainer:
        """A fresh run, shared among the processes that there are."""
        seed_generators(config.seed)
        model = OSPModel(config.model, config.recipe)
        optimizers = make_optimizers(model, config)
        return cls(
            config, directory, streams, model, optimizers, StepGuard(config.skip_limit), distributed.replicated(model)
        )

    def run(self, quiet: bool = False) -> dict[str, float]:
        """Trains up to `config.steps`, with a progress bar on stderr unless `quiet`; returns the last evaluation.

        Raises:
            TrainingError: see `train_step` and `write_checkpoint`.
            TrainingStoppedError: SIGTERM came; the steps so far are saved.
        """
        config = self.config
        tokens_at_start, started = self.step * config.batch_tokens, time.monotonic()
        evaluation = self.evaluate()
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=quiet or distributed.rank() > 0 or None)
        with bar, self._log() as log, stop_requests() as stop_requested:
            while self.step < config.steps:
                loss = self.train_step()
                bar.update()
                last, stopping = self.step == config.steps, distributed.any_of(stop_requested())
                saving = self.step % config.checkpoint_every == 0 or last or stopping
                if self.step % config.eval_every == 0 or saving:
                    evaluation = self.evaluate()
                if self.step % LOG_EVERY == 0 or last:
                    speed = (self.step * config.batch_tokens - tokens_at_start) / (time.monotonic() - started)
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, {speed:,.0f} tok/s, excess kurtosis {evaluation['excess_kurtosis']:.3g}"
                    )
                    line = {"step": self.step, "loss": loss, "tokens_per_s": speed, **evaluation}
                    log.write(json.dumps(_finite({**line, "skipped_steps": self.guard.skipped})) + "\n")
                    log.flush()
                if saving:
                    self.save(evaluation["held_out_loss"])
                if stopping and not last:
                    raise TrainingStoppedError(self.step)
        return evaluation

    def _log(self) -> TextIO:
        """metrics.jsonl to append to, without the lines of steps that a killed run took after its last checkpoint.

        Only process 0 keeps a log.
        """
        if distributed.rank() > 0:
            return open(os.devnull, "w", encoding="utf-8")
        file = self.directory / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            with replacing(file) as kept:
                kept.writelines(line for line in lines if json.loads(line)["step"] <= self.step)
        return file.open("a", encoding="utf-8")

    def train_step(self) -> float:
        """One optimizer step; returns the training loss (nats a token).

        A step whose loss or gradient norm is not finite changes no parameter and no optimizer state; the next step
        reads the next batch.

        Raises:
            TrainingError: `config.skip_limit` steps in a row were not finite.
        """
        set_learning_rate(self.optimizers, learning_rate_share(self.step, self.config))
        loss = self._gradients()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.guard.accepts(loss, norm.item()):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
            for optimizer in self.optimizers:
                optimizer.step()
        elif self.guard.exhausted:
            raise TrainingError(self._not_finite(loss, norm.item()))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _gradients(self) -> float:
        """Adds the gradients of the step's rows, those of this process in micro-batches; returns the loss of all."""
        rank, processes = distributed.rank(), distributed.world_size()
        windows_BL = training_batch(self.streams.train, self.config, self.step, rank, processes)
        parts = torch.split(windows_BL, max(1, self.config.micro_batch_tokens // self.config.model.context_length))
        loss = 0.0
        for number, part_BL in enumerate(parts, start=1):
            with distributed.adding_up(self.replica, more=number < len(parts)):
                share_loss = self._loss(self.replica, part_BL) * (len(part_BL) / len(windows_BL))
                torch.autograd.backward(share_loss)
            loss += share_loss.item()
        return distributed.mean_of(loss)

    def _not_finite(self, loss: float, norm: float) -> str:
        length, stream = self.config.model.context_length, self.streams.train
        starts = window_starts(len(stream), self.config, self.step, distributed.rank(), distributed.world_size())
        shards = sorted({file for start in starts for file in stream.files_of(start, start + length + 1)})
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; {self.guard.in_a_row} steps in a row had to be "
            f"skipped. {first_bad_parameter(self.model)}. The step read {', '.join(shards)}. {self._way_back()}"
        )

    def _way_back(self) -> str:
        found = checkpoints(self.directory)
        start = f"{found[-1]} is untouched: --resume with" if found else "There is no checkpoint yet: start with"
        return f"{start} a lower --matrix-lr and --embedding-lr"

    def _loss(self, model: nn.Module, windows_BL: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.autocast):
            logits_BLV = model(windows_BL[:, :-1])
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), windows_BL[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`held_out_loss` (nats a token), and the residual stream's `excess_kurtosis` (block mean) and `absmax`."""
        self.model.eval()
        windows_BL = held_out_windows(self.streams.held_out, self.config.model.context_length, self.config.eval_tokens)
        batches = torch.split(windows_BL, EVAL_ROWS)
        total = sum(self._loss(self.model, batch).item() * batch.shape[0] for batch in batches)
        residual = measure_outliers(self.model, windows_BL[:KURTOSIS_WINDOWS, :-1])["residual"]
        self.model.train()
        return {
            "held_out_loss": total / windows_BL.shape[0],
            "excess_kurtosis": residual.mean_kurtosis,
            "absmax": residual.largest,
        }

    def save(self, held_out_loss: float = math.inf) -> None:
        """Writes a checkpoint, and drops all but the newest `config.keep_checkpoints` and the best.

        Process 0 writes the state of all, which must call this too.

        Raises:
            TrainingError: it could not be written, or the loss is NaN and so is the model; the others are as they were.
        """
        if math.isnan(held_out_loss):
            raise TrainingError(
                f"step {self.step}: the held-out loss is NaN, so that nothing is saved. "
                f"{first_bad_parameter(self.model)}. {self._way_back()}"
            )
        optimizers = distributed.whole_states(self.optimizers)
        if distributed.rank() > 0:
            return
        best = {"step": self.step, "held_out_loss": held_out_loss}
        if held_out_loss < self.best.get("held_out_loss", math.inf):
            self.best = best
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "best": self.best,
            "skipped": [self.guard.skipped, self.guard.in_a_row],
            "random": random_state(),
            "model": self.model.state_dict(),
            "optimizers": optimizers,
        }
        file = write_checkpoint(self.directory, state)
        if self.best is best:
            replace_json(file.parent / "best.json", {"checkpoint": file.name, **best})
        drop_old(self.directory, self.config.keep_checkpoints, int(self.best["step"]) if self.best else None)

    def restore(self, file: Path) -> None:
        """Continues from a checkpoint of the same settings, but for those that are `CHANGEABLE`.

        Raises:
            ConfigError: the checkpoint was made with other settings; the message names them.
            TrainingError: the file is damaged.
        """
        state = read_checkpoint(file, self.config)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["base_lr"] = peak
        self.guard.skipped, self.guard.in_a_row = state["skipped"]
        self.step, self.best = state["step"], state["best"]
        set_random_state(state["random"])


def _finite(line: dict[str, float]) -> dict[str, float | None]:
    # JSON has no NaN.
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


@distributed.process_group()
def train(
    paths: Sequence[str | os.PathLike[str]],
    directory: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a model on `paths` and exports it to `directory/final`; returns what osp.json says of the training.

    Processes that `torchrun` started share the run; they must see the same `directory`.

    Raises:
        TextError, DataError, ConfigError, TrainingError: see `data.prepare` and `Trainer.restore`; ConfigError also
            when `directory` holds a run already and `resume` is not set, or the other way round.
        TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
        TrainingStoppedError: SIGTERM came.
    """
    found = checkpoints(directory)
    if found and not resume:
        raise ConfigError(f"{directory} holds a run already; add --resume to continue it, or choose another --out")
    if resume and not found:
        raise ConfigError(f"{directory} holds no checkpoint to resume from")
    directory.mkdir(parents=True, exist_ok=True)
    with distributed.process_0_first():
        opened = resume or distributed.rank() > 0
        streams = prepare(paths, directory / "data", config, resume=opened, tokenizer=tokenizer)
    return train_on(streams, directory, config, dtype=dtype, quiet=quiet)


def train_on(
    streams: TokenStreams,
    directory: Path,
    config: TrainConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quiet: bool = False,
) -> dict[str, Any]:
    """As `train`, on data that is prepared already; goes on from the newest checkpoint in `directory`, if there is one.

    Raises as `train` does, but for ConfigError where there is a run already, or none.
    """
    trainer = Trainer.start(config, directory, streams)
    if found := checkpoints(directory):
        trainer.restore(found[-1])
    if distributed.rank() == 0:
        replace_json(directory / "config.json", config.to_dict())
    return _export(trainer, trainer.run(quiet), dtype)


def _export(trainer: Trainer, evaluation: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
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
        **{key: round(value, 6) for key, value in evaluation.items()},
    }
    if distributed.rank() == 0:
        final = trainer.directory / "final"
        final.mkdir(exist_ok=True)
        save_tokenizer(streams.tokenizer, final, config.model.context_length)
        export(trainer.model, final, report, streams.end_token_id, dtype)
    return report
