"""What a training step of OSP costs over one of AdamW, and Muon over torch's, in turn in one run.

    python -m benchmarks.step_time [--preset 17m] [--rounds 5] [--threads 1] [--json]

Every round takes a step of each trainer, then a step of each Muon on the gradients that are there. Results are medians
of ratios within a round. Seconds are those of the processor that the process used, all threads together, so that what a
shared machine does meanwhile counts little; threads that wait for one another count too, so that one is the fairest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import click
import torch
from torch.nn import functional as F

from trainer.config import PRESETS, TrainConfig, preset
from trainer.model import OSPModel
from trainer.muon import Muon
from trainer.optimizer import make_optimizers, parameter_groups


@dataclass(slots=True)
class Step:
    """A model and its optimizers, and how long the parts of its last step took, in seconds."""

    config: TrainConfig
    model: OSPModel
    optimizers: list[torch.optim.Optimizer]
    gradients_s: float = 0.0
    update_s: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Step:
        """On random numbers: time does not depend on what is learned."""
        torch.manual_seed(0)
        model = OSPModel(config.model, config.recipe)
        return cls(config, model, make_optimizers(model, config))

    def take(self) -> float:
        """One step of `config.batch_tokens`, in micro-batches; returns its seconds."""
        length = self.config.model.context_length
        ids_BL = torch.randint(self.config.model.vocab_size, (self.config.batch_tokens // length, length + 1))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.gradients_s = _seconds(lambda: self._gradients(ids_BL))
        self.update_s = _seconds(self._update)
        return self.gradients_s + self.update_s

    def _gradients(self, ids_BL: torch.Tensor) -> None:
        rows = max(1, self.config.micro_batch_tokens // self.config.model.context_length)
        for part_BL in torch.split(ids_BL, rows):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.autocast):
                logits_BLV = self.model(part_BL[:, :-1])
            loss = F.cross_entropy(logits_BLV.float().flatten(0, 1), part_BL[:, 1:].flatten())
            torch.autograd.backward(loss * (len(part_BL) / len(ids_BL)))

    def _update(self) -> None:
        parameters = list(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@click.command()
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="17m", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Of a step.  [default: the preset's]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(preset_name: str, rounds: int, batch_tokens: int | None, threads: int, as_json: bool) -> None:
    """Times steps of OSP and of AdamW, and of our Muon and torch's, in turn."""
    torch.set_num_threads(threads)
    adam = Step.of(preset(preset_name, recipe="adam", batch_tokens=batch_tokens))
    osp = Step.of(preset(preset_name, recipe="osp", batch_tokens=batch_tokens))
    matrices = parameter_groups(osp.model)["matrices"]
    ours = Muon(matrices, lr=0.0)
    theirs = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")
    rows: list[dict[str, float]] = []
    for number in range(rounds + 1):
        row = {"adam_s": adam.take(), "osp_s": osp.take()}
        row |= {"adam_update_s": adam.update_s, "osp_update_s": osp.update_s}
        row |= {"muon_s": _seconds(ours.step), "torch_muon_s": _seconds(theirs.step)}
        if number:  # the first pays for what is set up once
            rows.append(row)
    result = {
        "preset": preset_name,
        "batch_tokens": osp.config.batch_tokens,
        "threads": threads,
        "rounds": rounds,
        **{name: median(row[name] for row in rows) for name in rows[0]},
        "osp_over_adam": median(row["osp_s"] / row["adam_s"] for row in rows),
        "updates_over_adams_step": median((row["osp_update_s"] - row["adam_update_s"]) / row["adam_s"] for row in rows),
        "muon_over_torchs": median(row["muon_s"] / row["torch_muon_s"] for row in rows),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:>24}  {value:.4g}" if isinstance(value, float) else f"{name:>24}  {value}")


if __name__ == "__main__":
    main()
