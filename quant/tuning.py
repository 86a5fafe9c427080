"""Quantization-aware finishing: a short training in which the rounded model learns to be what the 16-bit one was.

Weights and inputs are rounded with the arithmetic of `quant.arithmetic`, straight through, and the scales are learned
with them. What is learned from is not the text but what the 16-bit model makes of it (the Kullback-Leibler divergence
of the next token's distribution), so that any text of the model's kind will do. A share of each batch goes through the
weights unrounded as well: the tuned 16-bit checkpoint stays as good as it was.

Matrices of the blocks are trained by Muon, as outlier-safe models are; embedding and head by AdamW; norms stay as they
are. The result is a 16-bit checkpoint like the one that it started from, with `scales.safetensors` beside it. Rounding
its weights to nearest by those scales gives the codes that were trained (where a weight is rotated, up to ties).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from quant.format import CheckpointReader
from quant.model import load_model
from quant.scheme import Scheme, SchemeError
from quant.trainable import parameter_groups, trainable_model, unrounded
from quant.tune_settings import TuneSettings, TuningError
from quant.tuned_checkpoint import write_tuned
from quant.tuning_text import TuningText

EVALUATIONS = 10
"""How often, in a run, the held-back text is looked at and the state is saved."""

STATE_FILE = "tuning.pt"

MOST_LOGITS = 2**26
"""So many logits are held at a time, in a handful of copies: a large vocabulary has smaller micro-batches."""


def tune(
    source: Path,
    start: Path,
    out: Path,
    text: TuningText,
    settings: TuneSettings,
    *,
    progress: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Tunes the 16-bit checkpoint `source` for the scheme of `start` into the directory `out`.

    Args:
        start: `source` quantized: its scheme is what is tuned for, its scales are where learning starts.
        text: of `source`, from `TuningText.for_model`.
        resume: goes on from the state that an interrupted run left in `out`.

    Returns:
        What osp.json records under "tuning".

    Raises:
        SchemeError: `start` is not quantized, or rotated as a whole.
        TuningError: the loss is not finite, or the state in `out` is that of another run.
    """
    reader, quantized = CheckpointReader(source), CheckpointReader(start)
    if quantized.scheme is None:
        raise SchemeError(f"{start} is not quantized; it says what to tune for")
    require_tunable(quantized.scheme)
    run = _Run(reader, quantized, quantized.scheme, settings, text)
    out.mkdir(parents=True, exist_ok=True)
    if resume and (out / STATE_FILE).exists():
        run.load(out / STATE_FILE)
    run.train(out / STATE_FILE, progress=progress)
    report = run.report()
    write_tuned(reader, out, run.model, report)
    (out / STATE_FILE).unlink(missing_ok=True)
    return report


def require_tunable(scheme: Scheme) -> None:
    """Raises `SchemeError` where a model cannot be tuned for `scheme`."""
    if scheme.hadamard == "full":
        raise SchemeError("a fully rotated model cannot be tuned: its 16-bit weights would be others; use hadamard ffn")


@dataclass(slots=True)
class _Run:
    """The state of a run: the model with trainable layers, its optimizers, and the best of what was seen."""

    reader: CheckpointReader
    quantized: CheckpointReader
    scheme: Scheme
    settings: TuneSettings
    text: TuningText
    model: LlamaForCausalLM = field(init=False)
    teacher: LlamaForCausalLM = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = trainable_model(self.reader, self.quantized, self.scheme)
        self.teacher = load_model(self.reader)
        self.optimizers = _make_optimizers(self.model, self.settings)

    def train(self, state_file: Path, *, progress: bool) -> None:
        settings = self.settings
        every = max(1, settings.steps // EVALUATIONS)
        if not self.losses:
            self._evaluate()
        bar = tqdm(total=settings.steps, initial=self.step, desc="tuning", disable=None if progress else True)
        with bar:
            while self.step < settings.steps and not self._stale():
                self._train_step()
                bar.update()
                if self.step % every == 0 or self.step == settings.steps:
                    self._evaluate()
                    bar.set_postfix_str(f"held-back divergence {self.losses[0]:.4f} -> {self.losses[-1]:.4f}")
                    self.save(state_file)
        self.model.load_state_dict(self.best)

    def _stale(self) -> bool:
        return len(self.losses) - 1 - int(np.argmin(self.losses)) >= self.settings.patience

    def _train_step(self) -> None:
        settings = self.settings
        warmup = max(1, round(settings.warmup_share * settings.steps))
        share = min(1.0, (self.step + 1) / warmup) * (1 - self.step / settings.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["base_lr"] * share
        batch_BL, total = torch.from_numpy(self.text.batch(self.step, settings.batch_tokens)), 0.0
        for part_BL in torch.split(batch_BL, self._rows()):
            wanted_BLV = self._teach(part_BL)
            loss = _divergence(self.model, part_BL, wanted_BLV)
            if settings.unrounded_share:
                kept = max(1, round(settings.unrounded_share * len(part_BL)))
                with unrounded(self.model):
                    kept_loss = _divergence(self.model, part_BL[:kept], wanted_BLV[:kept])
                loss = loss + settings.unrounded_share * kept_loss
            loss = loss * (len(part_BL) / len(batch_BL))
            torch.autograd.backward(loss)
            total += loss.item()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            raise TuningError(
                f"step {self.step + 1}: loss {total}, gradient norm {norm.item()}; lower --tune-lr, and start again"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _rows(self) -> int:
        """Windows that go through the model at a time."""
        most = min(self.settings.micro_batch_tokens, MOST_LOGITS // self.model.config.vocab_size)
        return max(1, most // self.text.window_length)

    @torch.no_grad()
    def _teach(self, windows_BL: Tensor) -> Tensor:
        """The 16-bit model's log probabilities, [B, L, V]."""
        return _log_probabilities(self.teacher, windows_BL)

    @torch.no_grad()
    def _evaluate(self) -> None:
        parts = torch.split(torch.from_numpy(self.text.held_back), self._rows())
        total = sum(_divergence(self.model, part, self._teach(part)).item() * len(part) for part in parts)
        self.losses.append(total / len(self.text.held_back))
        if self.losses[-1] <= min(self.losses):
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _identity(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "text": self.text.sha256, "scheme": self.scheme.to_dict()}

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        state = {
            "identity": self._identity(),
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Goes on where `save` was called.

        Raises:
            TuningError: the state belongs to other settings, another text or another scheme.
        """
        state = torch.load(file, weights_only=True)
        if state["identity"] != self._identity():
            raise TuningError(f"{file} belongs to a run with other settings or another text; remove it to start again")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.losses, self.best = state["step"], state["losses"], state["best"]

    def report(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme.to_dict(),
            "settings": asdict(self.settings),
            "steps": self.step,
            "tokens_seen": self.step * self.text.batch(0, self.settings.batch_tokens)[:, 1:].size,
            "text": self.text.source,
            "sha256": self.text.sha256,
            "held_back_divergence_before": self.losses[0],
            "held_back_divergence": min(self.losses),
        }


def _log_probabilities(model: LlamaForCausalLM, windows_BL: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BLV: Tensor = model(windows_BL[:, :-1], use_cache=False).logits
    return logits_BLV.float().log_softmax(-1)


def _divergence(model: LlamaForCausalLM, windows_BL: Tensor, wanted_BLV: Tensor) -> Tensor:
    """Kullback-Leibler divergence from what is wanted to what the model says, nats a token."""
    said_BLV = _log_probabilities(model, windows_BL)
    return F.kl_div(said_BLV.flatten(0, 1), wanted_BLV.flatten(0, 1), log_target=True, reduction="batchmean")


def _make_optimizers(model: LlamaForCausalLM, settings: TuneSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, as in training; AdamW for tables and scales."""
    groups, decay = parameter_groups(model), settings.weight_decay
    muon = torch.optim.Muon(
        [{"params": groups["matrices"], "lr": settings.matrix_lr, "weight_decay": decay}],
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        eps=1e-8,
        adjust_lr_fn="match_rms_adamw",
    )
    adam_groups = [
        {"params": groups["tables"], "lr": settings.table_lr, "weight_decay": decay},
        {"params": groups["scales"], "lr": settings.scale_lr, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [muon, torch.optim.AdamW(adam_groups, betas=(0.9, 0.95), eps=1e-8)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers
