"""Perplexity of a torch model, by the convention of `quant.text`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from quant.text import Perplexity

LOGIT_ROWS = 512
"""Rows of logits that are held at a time: a long context times a large vocabulary would not fit in memory."""


@torch.inference_mode()
def measure_perplexity(model: LlamaForCausalLM, windows: Sequence[list[int]], *, progress: bool = False) -> Perplexity:
    """The model's perplexity on windows of at least 2 token ids each.

    Raises:
        NonFiniteError: it is NaN or infinite.
        ValueError: there is no window.
    """
    if not windows:
        raise ValueError("perplexity needs at least one window of 2 tokens")
    total = 0.0
    for window in tqdm(windows, "perplexity", disable=None if progress else True, leave=False):
        total += _negative_log_likelihood(model, torch.tensor(window))
    return Perplexity.from_sum(total, sum(len(window) - 1 for window in windows))


def _negative_log_likelihood(model: LlamaForCausalLM, window_L: Tensor) -> float:
    hidden_LD = model.model(window_L[None], use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for hidden_ND, targets_N in zip(
        torch.split(hidden_LD, LOGIT_ROWS), torch.split(window_L[1:], LOGIT_ROWS), strict=True
    ):
        losses_N = nn.functional.cross_entropy(model.lm_head(hidden_ND), targets_N, reduction="none")
        total += float(losses_N.double().sum())
    return total
