"""The plugin in vLLM itself: the bundled 4-bit model, as it lies on disk, beside the quantizer's own simulation.

Runs where vLLM is installed (`make test-vllm`); it takes half a minute of one core to start.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytest.importorskip("transformers")

from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.stream import log_likelihoods
from runtime.engine.vllm_plugin import kernels_in_use, register
from runtime.model_store import resolve_model

WINDOWS = [[int(token) for token in np.random.default_rng(seed).integers(1, 4096, 200)] for seed in range(4)]


@pytest.fixture(scope="module")
def engine() -> Any:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    from vllm import LLM

    register()
    return LLM(
        str(resolve_model("demo")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256
    )


def test_perplexity_is_the_simulation_s(engine: Any, tmp_path: Path) -> None:
    """vLLM has no 4-bit KV cache, so neither has the oracle."""
    from vllm import SamplingParams

    oracle = shutil.copytree(resolve_model("demo"), tmp_path / "demo")
    config = json.loads((oracle / "config.json").read_text())
    config["quantization_config"]["scheme"]["kv_bits"] = 16
    (oracle / "config.json").write_text(json.dumps(config))
    expected = np.concatenate(log_likelihoods(CheckpointReader(oracle), WINDOWS))
    outputs = engine.generate(
        [{"prompt_token_ids": window} for window in WINDOWS],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    found = np.array(
        [
            scores[token].logprob
            for output, window in zip(outputs, WINDOWS, strict=True)
            for scores, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)
        ]
    )
    assert math.exp(abs(found.mean() - expected.mean())) < 1.005
    # A sum in another order moves an input across a rounding boundary now and then, and that token's score with it.
    assert np.abs(found - expected).mean() < 0.05


def test_each_layer_says_its_kernel(engine: Any) -> None:
    (kernels,) = engine.llm_engine.collective_rpc(lambda worker: kernels_in_use(worker.model_runner.model))
    assert set(kernels) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    # Four bits a weight in memory, as in the checkpoint; the demo model's head has eight.
    assert all(kernel.startswith("native int4 (") for kind, kernel in kernels.items() if kind != "lm_head")
    assert kernels["lm_head"].startswith("native ")


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
