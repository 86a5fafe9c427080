"""What the plugin refuses, and what it says of its kernels. `test_vllm_server.py` has a model that runs.

Runs where vLLM is installed (`make test-vllm`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from quant.llama import CheckpointError
from runtime.engine.vllm_plugin import kernels_text
from runtime.model_store import resolve_model


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from runtime.engine.vllm_quantization import OspConfig

    damaged = shutil.copytree(resolve_model("demo"), tmp_path / "demo")
    tensors = load_file(damaged / "osp.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, damaged / "osp.safetensors")
    config = OspConfig.from_config(json.loads((damaged / "config.json").read_text())["quantization_config"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale is missing"):
        config.maybe_update_config(str(damaged))


def test_parts_with_different_bits_are_refused() -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from quant.scheme import named
    from runtime.engine.vllm_methods import UnsupportedLayerError
    from runtime.engine.vllm_quantization import OspConfig

    config = OspConfig(named("w4a8").changed(v={"weight_bits": 8}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(UnsupportedLayerError, match="different bits"):
        config.get_quant_method(LinearBase.__new__(LinearBase), "model.layers.0.self_attn.qkv_proj")


def test_kernels_are_told_with_the_layers_that_they_serve() -> None:
    one, other = {"qkv_proj": "A", "o_proj": "A", "lm_head": "B"}, {"qkv_proj": "A", "o_proj": "B", "lm_head": "B"}
    assert kernels_text([one]) == "A (qkv_proj, o_proj); B (lm_head)"
    assert kernels_text([one, other]) == "A (qkv_proj, o_proj); B (lm_head, o_proj)", "of two workers that differ"
    assert kernels_text([{}]) == ""
