"""The torch model of a checkpoint: as it stands in float32, or, for a 4-bit one, simulated bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quant import arithmetic
from quant.format import Checkpoint, QuantizedLinear


class SimulatedLinear(nn.Module):
    """`arithmetic.quantized_linear` in torch: float32 [..., K] -> float32 [..., M], the same bits.

    Raises:
        ValueError: K exceeds `arithmetic.MAX_REDUCTION`, beyond which float32 sums are not exact.
    """

    weight_codes: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        if linear.in_features > arithmetic.MAX_REDUCTION:
            raise ValueError(f"a reduction of {linear.in_features} exceeds {arithmetic.MAX_REDUCTION}")
        self.register_buffer("weight_codes", torch.from_numpy(linear.codes.astype(np.float32)))
        # Tensors, not Python numbers: torch may turn a division by a number into a product with its reciprocal.
        self.register_buffer("input_scale", torch.tensor([linear.input_scale], dtype=torch.float32))
        output_scale = np.float32(linear.input_scale) * np.float32(linear.weight_scale)
        self.register_buffer("output_scale", torch.tensor([output_scale], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.round(x / self.input_scale).clamp(arithmetic.Q_MIN, arithmetic.Q_MAX)
        return nn.functional.linear(codes, self.weight_codes) * self.output_scale


def load_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The checkpoint's tensors, and no others, in a float32 `LlamaForCausalLM` ready for inference.

    The linear layers of a 4-bit checkpoint become `SimulatedLinear`; everything else computes in float32.
    """
    fields = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig.from_dict({key: value for key, value in fields.items() if key != "quantization_config"})
    with torch.device("meta"):  # allocates and initializes nothing
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, not stored, so it must not stay on "meta"

    state = {name: _tensor(values) for name, values in checkpoint.floats.items()}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, linear in checkpoint.linears.items():
        if isinstance(linear, QuantizedLinear):
            module = SimulatedLinear(linear)
            model.set_submodule(name, module)
            state |= module.state_dict(prefix=f"{name}.")
        else:
            state[f"{name}.weight"] = _tensor(linear)
    model.load_state_dict(state, strict=True, assign=True)
    model.train(False)
    model.requires_grad_(False)
    return model


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32, copy=False))
