"""How good a model is while it trains, and where it has outliers: on the held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from trainer.compute import Compute
from trainer.config import TrainConfig
from trainer.data import Tokens, held_out_windows
from trainer.model import OSPModel
from trainer.outliers import Site, SiteOutliers, measure_outliers, single_tokens

View = Literal["in_context", "single_tokens"]
"""How text is read when outliers are measured; see `outliers`."""

EVAL_ROWS = 8
KURTOSIS_WINDOWS = 8
"""Windows that outliers are measured on."""

SINGLE_TOKENS = 1024
"""The tokens of those windows that are measured alone, at most."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation.

    Attributes:
        held_out_loss: nats a token.
        outliers: by view and site; each has a number for every layer.
    """

    held_out_loss: float
    outliers: dict[View, dict[Site, SiteOutliers]]

    def summary(self) -> dict[str, float]:
        """`held_out_loss`, and the residual stream's `excess_kurtosis` (mean over blocks) and `absmax` in context."""
        residual = self.outliers["in_context"]["residual"]
        return {
            "held_out_loss": self.held_out_loss,
            "excess_kurtosis": residual.mean_kurtosis,
            "absmax": residual.largest,
        }

    def outliers_as_dict(self) -> dict[str, Any]:
        """{view: {site: {"excess_kurtosis": [a layer …], "absmax": [a layer …]}}}."""
        return {view: {site: asdict(of) for site, of in sites.items()} for view, sites in self.outliers.items()}


@torch.no_grad()
def evaluate(model: OSPModel, compute: Compute, held_out: Tokens, config: TrainConfig) -> Evaluation:
    """Evaluates `model` on at most `config.eval_tokens` of the held-out stream, in evaluation mode.

    The loss is computed as in training; outliers with float32 products.
    """
    training = model.training
    model.eval()
    windows_BL = held_out_windows(held_out, config.model.context_length, config.eval_tokens)
    batches = torch.split(windows_BL, EVAL_ROWS)
    total = sum(compute.loss(model, batch_BL).item() * len(batch_BL) for batch_BL in batches)
    ids_BL = windows_BL[:KURTOSIS_WINDOWS, :-1].to(compute.device)
    outliers: dict[View, dict[Site, SiteOutliers]] = {
        "in_context": measure_outliers(model, ids_BL),
        "single_tokens": measure_outliers(model, single_tokens(ids_BL, SINGLE_TOKENS)),
    }
    model.train(training)
    return Evaluation(total / len(windows_BL), outliers)
