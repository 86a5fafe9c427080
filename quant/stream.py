"""Runs windows of text through a model a block at a time: of the weights, one block is in memory.

A window's hidden states are float32 [L, D]; what is held is those of all windows, between two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from quant.model import WeightSource, build_block, build_embedding, build_head, build_norm, transformers_config

LOGIT_ROWS = 512
"""Rows of logits that are held at a time: a long context times a large vocabulary would not fit in memory."""


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
    def outputs(self, block: LlamaDecoderLayer) -> list[Tensor]:
        """What `block` makes of the states, which stay."""
        return [self._run(block, state) for state in self.states]

    @torch.inference_mode()
    def advance(self, block: LlamaDecoderLayer) -> None:
        """The states become what `block` makes of them."""
        for i, state in enumerate(self.states):
            self.states[i] = self._run(block, state)

    def _run(self, block: LlamaDecoderLayer, state_LD: Tensor) -> Tensor:
        positions = torch.arange(len(state_LD))[None]
        output: Tensor = block(state_LD[None], position_embeddings=self._rotary(state_LD[None], positions))
        return output[0]


@torch.inference_mode()
def log_likelihoods(
    source: WeightSource,
    windows: Sequence[list[int]],
    *,
    scored: Sequence[int] | None = None,
    progress: str | None = None,
) -> list[NDArray[np.float64]]:
    """The log likelihood, in nats, of every token of a window but its first: [L - 1] for each window.

    Windows that differ in their last token only are run once.

    Args:
        windows: at least 2 token ids each; all but the last fit into the context.
        scored: of each window, how many of its last tokens to score, where not all; 1 to L - 1.
        progress: what to call the bar on stderr, if there is to be one.
    """
    inputs = [tuple(window[:-1]) for window in windows]  # nothing follows from a window's last token
    distinct = list(dict.fromkeys(inputs))
    hidden = HiddenStates(source, [list(ids) for ids in distinct])
    layers = range(source.config.num_hidden_layers)
    for layer in tqdm(layers, progress, disable=None if progress else True, leave=False):
        hidden.advance(build_block(source, hidden.config, layer))
    norm, head = build_norm(source), build_head(source)
    state_of = dict(zip(distinct, hidden.states, strict=True))
    counts = [len(ids) for ids in inputs] if scored is None else scored
    return [
        _token_log_likelihoods(head, norm(state_of[ids][-count:]), torch.tensor(window[-count:]))
        for ids, window, count in zip(inputs, windows, counts, strict=True)
    ]


def _token_log_likelihoods(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> NDArray[np.float64]:
    parts = [
        -nn.functional.cross_entropy(head(rows_ND), targets, reduction="none").double()
        for rows_ND, targets in zip(torch.split(hidden_ND, LOGIT_ROWS), torch.split(targets_N, LOGIT_ROWS), strict=True)
    ]
    return np.asarray(torch.cat(parts).numpy())
