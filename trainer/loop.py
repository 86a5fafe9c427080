"""The training loop: batches, schedule, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from trainer import distributed
from trainer.atomic_file import replace_json
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
from trainer.compute import Compute, compiled, use_deterministic_algorithms
from trainer.config import TrainConfig
from trainer.data import TokenStreams, training_batch, window_starts
from trainer.evaluation import Evaluation, evaluate
from trainer.guard import StepGuard, TrainingStoppedError, first_bad_parameter, stop_requests
from trainer.model import OSPModel
from trainer.optimizer import learning_rate_share, make_optimizers, set_learning_rate
from trainer.telemetry import telemetry

LOG_EVERY = 10


@dataclass(slots=True)
class Trainer:
    """One run's state.

    Attributes:
        step: finished optimizer steps, skipped ones too; it is also the data cursor.
        best: step and held-out loss of the best checkpoint so far.
        replica: `model` as training calls it: compiled if that is wanted, and so that gradients are those of all
            processes of the run.
    """

    config: TrainConfig
    directory: Path
    streams: TokenStreams
    model: OSPModel
    optimizers: list[torch.optim.Optimizer]
    guard: StepGuard
    compute: Compute
    replica: nn.Module
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: TrainConfig, directory: Path, streams: TokenStreams) -> Trainer:
        """A fresh run, shared among the processes that there are.

        Raises:
            ConfigError: see `Compute.chosen`.
        """
        compute = Compute.chosen(config)
        if config.deterministic:
            use_deterministic_algorithms()
        seed_generators(config.seed)
        # Made on the CPU, so that every device begins with the same numbers.
        model = OSPModel(config.model, config.recipe, activation_checkpointing=config.activation_checkpointing)
        model.to(compute.device)
        optimizers = make_optimizers(model, config)
        replica = distributed.replicated(compiled(model) if config.compile else model)
        return cls(config, directory, streams, model, optimizers, StepGuard(config.skip_limit), compute, replica)

    def run(self, quiet: bool = False, *, tensorboard: bool = False) -> Evaluation:
        """Trains up to `config.steps`, with a progress bar on stderr unless `quiet`; returns the last evaluation.

        Args:
            tensorboard: write TensorBoard's files too, see `telemetry`.

        Raises:
            ConfigError: see `telemetry`.
            TrainingError: see `train_step` and `write_checkpoint`.
            TrainingStoppedError: SIGTERM came; the steps so far are saved.
        """
        config = self.config
        tokens_at_start, started = self.step * config.batch_tokens, time.monotonic()
        evaluation = self.evaluate()
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=quiet or distributed.rank() > 0 or None)
        logs = telemetry(self.directory, self.step, tensorboard=tensorboard)
        with bar, logs as log, stop_requests() as stop_requested:
            if self.step == 0:
                log.evaluated(0, evaluation)
            while self.step < config.steps:
                loss = self.train_step()
                bar.update()
                last, stopping = self.step == config.steps, distributed.any_of(stop_requested())
                saving = self.step % config.checkpoint_every == 0 or last or stopping
                if self.step % config.eval_every == 0 or saving:
                    evaluation = self.evaluate()
                    log.evaluated(self.step, evaluation)
                if self.step % LOG_EVERY == 0 or last:
                    speed = (self.step * config.batch_tokens - tokens_at_start) / (time.monotonic() - started)
                    values = {"loss": loss, "tokens_per_s": speed, **evaluation.summary()}
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, {speed:,.0f} tok/s, excess kurtosis {values['excess_kurtosis']:.3g}"
                    )
                    log.trained(self.step, {**values, "skipped_steps": self.guard.skipped})
                if saving:
                    self.save(evaluation.held_out_loss)
                if stopping and not last:
                    raise TrainingStoppedError(self.step)
        return evaluation

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
                share_loss = self.compute.loss(self.replica, part_BL) * (len(part_BL) / len(windows_BL))
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

    def evaluate(self) -> Evaluation:
        """The model as it is, on the held-out text."""
        return evaluate(self.model, self.compute, self.streams.held_out, self.config)

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
