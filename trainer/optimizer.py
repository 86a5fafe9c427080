"""Muon for the matrices, AdamW for the rest; every parameter in exactly one group.

Adam keeps a second moment for each element, which lets single channels grow: one root of the outliers. Muon
orthogonalizes the update of a whole matrix and so has no preferred channel. Embedding and head are lookups by token,
where Muon does not pay; OSP leaves them to Adam and puts a Muon-trained projection beside each. Norms have no matrix to
orthogonalize, and are AdamW's in every recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trainer.config import RECIPES, TrainConfig
from trainer.distributed import sharded
from trainer.model import OSPModel
from trainer.muon import Muon

ADAM_BETAS = (0.9, 0.95)
NEWTON_SCHULZ_STEPS = 5


def parameter_groups(model: OSPModel) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: `matrices` (the body and both projections), `tables` (embedding, head), `norms`.

    The role follows from the module, not from a name or a shape.

    Raises:
        RuntimeError: a parameter would be in no group or in two.
    """
    tables: list[nn.Module] = [model.embed_tokens, model.lm_head]
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "norms": []}
    for module in model.modules():
        if any(module is table for table in tables):
            role = "tables"
        elif isinstance(module, nn.Linear):
            role = "matrices"
        else:
            role = "norms"
        groups[role] += module.parameters(recurse=False)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    if sorted(grouped) != sorted(id(parameter) for parameter in model.parameters()):
        raise RuntimeError("the optimizer groups do not cover every parameter exactly once")
    return groups


def make_optimizers(model: OSPModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers, their state shared among the processes of the run.

    Each group's `base_lr` is the peak that `set_learning_rate` scales.
    """
    groups, parts = parameter_groups(model), RECIPES[config.recipe]
    tables = {"params": groups["tables"], "lr": config.embedding_lr, "weight_decay": config.weight_decay}
    norms = {"params": groups["norms"], "lr": config.embedding_lr, "weight_decay": 0.0}
    matrices = {"params": groups["matrices"], "lr": config.matrix_lr, "weight_decay": config.weight_decay}
    muon_groups = [matrices] * parts.muon_matrices + [tables] * parts.muon_tables
    adam_groups = [group for group in (tables, norms, matrices) if group not in muon_groups]
    optimizers: list[torch.optim.Optimizer] = []
    if muon_groups:
        dtype = getattr(torch, config.newton_schulz_dtype)
        optimizers.append(sharded(Muon, muon_groups, ns_steps=NEWTON_SCHULZ_STEPS, dtype=dtype))
    optimizers.append(sharded(torch.optim.AdamW, adam_groups, lr=config.embedding_lr, betas=ADAM_BETAS, eps=1e-8))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, stable, linear decay towards zero."""
    warmup = max(1, round(config.warmup_share * config.steps))
    decay = max(1, round(config.decay_share * config.steps))
    return min(1.0, (step + 1) / warmup, (config.steps - step) / decay)


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Sets every group to `share` of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base_lr"] * share
