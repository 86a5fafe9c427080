"""Folds SSNorm and the embedding projections away: what is left is a plain Hugging Face Llama.

E' = E R1^T      embedding, then projection, is one table
H' = H R2        projection, then head, is one matrix
SSNorm -> RMSNorm with a constant weight
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from quant.format import FORMAT_VERSION, sha256, write_json
from trainer.config import RECIPES
from trainer.model import OSPModel, SSNorm

FOLDING_TOLERANCE = 1e-9
"""Largest relative difference of logits, in float64, that folding may make. Rounding alone gives about 1e-14."""


class ExportError(RuntimeError):
    """Folding changed what the model computes."""


@torch.no_grad()
def folded(model: OSPModel) -> OSPModel:
    """The equivalent plain Llama (RMSNorm, no projections), in the precision of `model`."""
    parts = RECIPES[model.recipe]
    if parts.plain:
        return model
    whole = model.state_dict()
    state = {name: tensor for name, tensor in whole.items() if "projection" not in name}
    for name, module in model.named_modules():
        if isinstance(module, SSNorm):
            state[f"{name}.weight"] = state.pop(f"{name}.scale").expand(model.config.hidden_size)
    if parts.embedding_projections:
        state["embed_tokens.weight"] = whole["embed_tokens.weight"] @ whole["embed_projection.weight"].T
        state["lm_head.weight"] = whole["lm_head.weight"] @ whole["head_projection.weight"]
    plain = OSPModel(model.config, "adam").to(model.lm_head.weight.dtype)
    plain.load_state_dict(state)
    return plain


def llama_state(model: OSPModel) -> dict[str, Tensor]:
    """The parameters of a folded model under the names of `LlamaForCausalLM`."""
    return {
        name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in model.state_dict().items()
    }


def llama_config(model: OSPModel, end_token_id: int | None = None, dtype: str = "float32") -> LlamaConfig:
    """The Hugging Face configuration of the folded model; one token both begins and ends a document."""
    config = model.config
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
        bos_token_id=end_token_id,
        eos_token_id=end_token_id,
    )


@torch.no_grad()
def assert_unchanged(model: OSPModel) -> float:
    """Compares the logits of `model` before and after folding, both in float64, on random tokens.

    Returns:
        The largest difference over the largest logit.

    Raises:
        ExportError: it exceeds `FOLDING_TOLERANCE`.
    """
    double = OSPModel(model.config, model.recipe).double()
    double.load_state_dict(model.state_dict())
    length = min(32, model.config.context_length)
    ids_BL = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    before_BLV, after_BLV = double(ids_BL), folded(double)(ids_BL)
    difference = float((before_BLV - after_BLV).abs().max() / before_BLV.abs().max())
    if not difference <= FOLDING_TOLERANCE:
        raise ExportError(f"folding changed the logits by {difference:.2e} of the largest; the export is refused")
    return difference


def export(
    model: OSPModel, directory: Path, provenance: Mapping[str, Any], end_token_id: int, dtype: torch.dtype
) -> None:
    """Writes config, weights, generation_config.json and osp.json into `directory`, which holds the tokenizer already.

    Args:
        provenance: goes into osp.json under "training".
        end_token_id: the token that begins and ends documents.
        dtype: what the weights are stored in.

    Raises:
        ExportError: folding would change the logits.
    """
    assert_unchanged(model)
    dtype_name = str(dtype).removeprefix("torch.")
    state = {name: tensor.to(dtype).contiguous().clone() for name, tensor in llama_state(folded(model)).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates files that only their owner can read; a server may run as another user.
    shutil.copymode(directory / "tokenizer.json", directory / "model.safetensors")
    llama_config(model, end_token_id, dtype_name).save_pretrained(directory)
    write_json(directory / "generation_config.json", {"bos_token_id": end_token_id, "eos_token_id": end_token_id})
    tokenizer = sha256(directory / "tokenizer.json")
    write_json(
        directory / "osp.json",
        {"format_version": FORMAT_VERSION, "tokenizer_sha256": tokenizer, "training": dict(provenance)},
    )
