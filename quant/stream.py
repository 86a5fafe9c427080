"""Runs windows of text through a model a block at a time: of the weights, one block is in memory.

A window's hidden states are float32 [L, D]. What is held is those of all windows between two blocks; to score a long
text, those of a group of windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from quant.model import WeightSource, build_block, build_embedding, build_head, build_norm, transformers_config

LOGIT_ROWS = 512
"""Rows of logits that are held at a time: a long context times a large vocabulary would not fit in memory."""

GROUP_TOKENS = 65_536
"""Tokens that are scored at a time. Each group reads every block once more, which costs little beside running it."""


class HiddenStates:
    """The hidden states of windows of token ids, on their way through a model.

    Attributes:
        config: of the model, as transformers has it.
        windows: the token ids, each window 1 to context length long.
        states: of each window, [L, D] float32, as the next block will read them.
    """

    @torch.inference_mode()
    def __init__(self, source: WeightSource, windows: Sequence[list[int]]) -> None:
        self.config = transformers_config(source)
        self.windows = windows
        self._rotary = LlamaRotaryEmbedding(self.config)
        embedding = build_embedding(source)
        self.states: list[Tensor] = [embedding(torch.tensor(window)) for window in windows]

    @torch.inference_mode()
    def advance(self, block: LlamaDecoderLayer) -> None:
        """The states become what `block` makes of them."""
        for i, state_LD in enumerate(self.states):
            positions = torch.arange(len(state_LD))[None]
            self.states[i] = block(state_LD[None], position_embeddings=self._rotary(state_LD[None], positions))[0]


@torch.inference_mode()
def log_likelihoods(
    source: WeightSource,
    windows: Sequence[list[int]],
    *,
    scored: Sequence[int] | None = None,
    progress: str | None = None,
) -> list[NDArray[np.float64]]:
    """The log likelihood, in nats, of every token of a window but its first: [L - 1] for each window.

    Windows that differ in their last token only are run once. The hidden states of about `GROUP_TOKENS` are in memory.

    Args:
        windows: at least 2 token ids each; all but the last fit into the context.
        scored: of each window, how many of its last tokens to score, where not all; 1 to L - 1.
        progress: what to call the bar on stderr, if there is to be one.
    """
    inputs = [tuple(window[:-1]) for window in windows]  # nothing follows from a window's last token
    counts = [len(ids) for ids in inputs] if scored is None else scored
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(inputs):
        alike.setdefault(ids, []).append(i)
    groups, scores = _groups(alike), dict[int, NDArray[np.float64]]()
    steps = len(groups) * source.config.num_hidden_layers
    with tqdm(total=steps, desc=progress, disable=None if progress else True, leave=False) as bar:
        for group in groups:
            targets = {i: torch.tensor(windows[i][-counts[i] :]) for ids in group for i in alike[ids]}
            scores |= _group_log_likelihoods(source, {ids: alike[ids] for ids in group}, targets, bar)
    return [scores[i] for i in range(len(windows))]


def _group_log_likelihoods(
    source: WeightSource,
    alike: Mapping[tuple[int, ...], Sequence[int]],
    targets: Mapping[int, Tensor],
    bar: tqdm[NoReturn],
) -> dict[int, NDArray[np.float64]]:
    """Of the last targets of every window; `alike` has the windows that are the same but for their last token."""
    hidden = HiddenStates(source, [list(ids) for ids in alike])
    for layer in range(source.config.num_hidden_layers):
        hidden.advance(build_block(source, hidden.config, layer))
        bar.update()
    norm, head = build_norm(source), build_head(source)
    return {
        i: _token_log_likelihoods(head, norm(state_LD[-len(targets[i]) :]), targets[i])
        for state_LD, same in zip(hidden.states, alike.values(), strict=True)
        for i in same
    }


def _groups(inputs: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Cut so that each has at most `GROUP_TOKENS` tokens, or one window that has more."""
    groups: list[list[tuple[int, ...]]] = []
    room = 0
    for ids in inputs:
        if not groups or len(ids) > room:
            groups.append([])
            room = GROUP_TOKENS
        groups[-1].append(ids)
        room -= len(ids)
    return groups


def _token_log_likelihoods(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> NDArray[np.float64]:
    parts = [
        -nn.functional.cross_entropy(head(rows_ND), targets, reduction="none").double()
        for rows_ND, targets in zip(torch.split(hidden_ND, LOGIT_ROWS), torch.split(targets_N, LOGIT_ROWS), strict=True)
    ]
    return np.asarray(torch.cat(parts).numpy())
