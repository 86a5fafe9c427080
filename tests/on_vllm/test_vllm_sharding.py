"""Single layers and tables in vLLM, whole and shared out over two ranks, which are processes here, against numpy."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant import arithmetic
from quant.format import CheckpointReader
from quant.hadamard import Hadamard
from quant.scheme import Scheme, named
from runtime.model_store import resolve_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

WIDTH, OUTPUTS, VOCABULARY = 64, 32, 97
PARTS = {"q": 4, "k": 2, "v": 2}
"""Heads, of 8 channels."""
INPUT_SCALE = np.float32(0.5)
SCHEMES = ("w4a4", "w4a4-token", "w4a16")
TABLE_BITS = (16, 8, 4)
WINDOWS = [[int(token) for token in np.random.default_rng(seed).integers(1, 4096, 120)] for seed in range(4)]


def config(scheme: Scheme) -> Any:
    from runtime.engine.vllm_quantization import OspConfig

    made = OspConfig(scheme)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


class Weights:
    """Random codes and scales, the same in every process."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, rows: int, bits: int, per_row: bool) -> tuple[np.ndarray, np.ndarray]:
        lowest, highest = arithmetic.code_range(bits)
        codes_MK = self._rng.integers(lowest, highest + 1, (rows, WIDTH)).astype(np.int8)
        scale = self._rng.uniform(0.01, 0.1, rows if per_row else 1).astype(np.float32)
        return codes_MK, arithmetic.round_to_bfloat16(scale)

    def floats(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal(shape).astype(np.float32)


def load(layer: Any, shard: tuple[str, ...] = (), **values: np.ndarray) -> None:
    """As vLLM loads a checkpoint."""
    import torch

    for name, value in values.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, torch.from_numpy(value), *shard)


def stored(codes_MK: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    if bits == 4:
        return {"weight_packed": arithmetic.pack(codes_MK), "weight_scale": scale}
    return {"weight_codes": codes_MK, "weight_scale": scale}


def linear(name: str, x_NK: np.ndarray, codes_MK: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if name == "w4a16":
        return x_NK.astype(np.float64) @ (codes_MK * scale[:, None].astype(np.float64)).T
    return arithmetic.quantized_linear(x_NK, INPUT_SCALE if name == "w4a4" else None, codes_MK, scale)


def linear_differences(rank: int, ranks: int, found: dict[str, float]) -> None:
    import torch
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    for name in SCHEMES:
        weights, per_row = Weights(1), name == "w4a4-token"
        common: Any = {"bias": False, "quant_config": config(named(name).changed(hadamard="ffn"))}
        common["params_dtype"] = torch.float32
        input_scale = {"input_scale": np.array([INPUT_SCALE])} if name == "w4a4" else {}
        x_NK = weights.floats(5, WIDTH)
        down = RowParallelLinear(WIDTH, OUTPUTS, prefix="model.layers.0.mlp.down_proj", **common)
        matrix = weights.matrix(OUTPUTS, 4, per_row)
        load(down, **stored(*matrix, 4), **input_scale)
        down.quant_method.process_weights_after_loading(down)
        share = torch.from_numpy(np.split(x_NK, ranks, axis=1)[rank].copy())
        expected_NM = linear(name, Hadamard.of_width(WIDTH).apply(x_NK), *matrix)
        found[f"{name} down"] = float(np.abs(down(share)[0].numpy() - expected_NM).max())
        qkv = QKVParallelLinear(WIDTH, 8, 4, 2, prefix="model.layers.0.self_attn.qkv_proj", **common)
        shares = []
        for part, heads in PARTS.items():
            matrix = weights.matrix(8 * heads, 4, per_row)
            load(qkv, (part,), **stored(*matrix, 4), **input_scale)
            shares.append(np.split(linear(name, x_NK, *matrix), ranks, axis=1)[rank])
        qkv.quant_method.process_weights_after_loading(qkv)
        difference_NM = qkv(torch.from_numpy(x_NK))[0].numpy() - np.concatenate(shares, axis=1)
        found[f"{name} qkv"] = float(np.abs(difference_NM).max())


def table_differences(rank: int, ranks: int, found: dict[str, float]) -> None:
    """Of heads and embeddings; the vocabulary is no multiple of anything."""
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tokens = np.array([0, 5, VOCABULARY - 1, 63, 64])
    for bits in TABLE_BITS:
        weights = Weights(bits)
        scheme = named("w4a4").changed(head=bits, embedding_bits=bits)
        common: Any = {"params_dtype": torch.float32, "quant_config": config(scheme)}
        embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, prefix="model.embed_tokens", **common)
        heads = {"head": ParallelLMHead(VOCABULARY, WIDTH, prefix="lm_head", **common)}
        tied = ParallelLMHead(VOCABULARY, WIDTH, prefix="lm_head", **common)
        heads["tied head"] = tied.tie_weights(embedding)
        x_NK = weights.floats(3, WIDTH)
        if bits == 16:
            table = weights.floats(VOCABULARY, WIDTH)
            values, logits_NV = {"weight": table}, x_NK.astype(np.float64) @ table.T
        else:
            codes_MK, scale = weights.matrix(VOCABULARY, bits, per_row=True)
            values, table = stored(codes_MK, scale, bits), codes_MK * scale[:, None]
            logits_NV = arithmetic.quantized_linear(x_NK, None, codes_MK, scale, 8, bits)
        load(embedding, **values)
        load(heads["head"], **values)
        for layer in (heads["head"], heads["tied head"], embedding):
            layer.quant_method.process_weights_after_loading(layer)
        rows = embedding(torch.from_numpy(tokens)).numpy()
        found[f"{bits} bits embedding"] = float(np.abs(rows - table[tokens]).max())
        for name, head in heads.items():
            y_NV = head.quant_method.apply(head, torch.from_numpy(x_NK)).numpy()
            size = y_NV.shape[1]
            share_NV = logits_NV[:, rank * size : (rank + 1) * size]
            found[f"{bits} bits {name}"] = float(np.abs(y_NV[:, : share_NV.shape[1]] - share_NV).max())


def differences(rank: int, ranks: int, port: int, answers: Any) -> None:
    """Puts the largest difference of each layer into `answers`."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    found: dict[str, float] = {}
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        initialize_model_parallel(ranks)
        linear_differences(rank, ranks, found)
        table_differences(rank, ranks, found)
        answers.put(found)
        torch.distributed.barrier()


@cache
def measured(ranks: int) -> list[dict[str, float]]:
    """What each rank has found."""
    import torch.multiprocessing

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=differences, args=(rank, ranks, port, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return found


def of_all_ranks(ranks: int, name: str) -> Iterator[float]:
    yield from (found[name] for found in measured(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_compute_the_whole_layer(scheme: str, ranks: int) -> None:
    exact = scheme != "w4a16"
    assert all(difference <= (0 if exact else 1e-5) for difference in of_all_ranks(ranks, f"{scheme} qkv"))
    # Each rank scales its own sum in float32, then the two are added.
    exact &= ranks == 1
    assert all(difference <= (0 if exact else 1e-5) for difference in of_all_ranks(ranks, f"{scheme} down"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bits", TABLE_BITS)
def test_tables_of_any_bits(bits: int, ranks: int) -> None:
    assert all(difference == 0 for difference in of_all_ranks(ranks, f"{bits} bits embedding"))
    for head in ("head", "tied head"):
        assert all(
            difference <= (1e-4 if bits == 16 else 0) for difference in of_all_ranks(ranks, f"{bits} bits {head}")
        )


def test_a_share_that_ends_within_a_byte_is_refused() -> None:
    import torch

    from runtime.engine.vllm_methods import UnsupportedLayerError

    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"  # type: ignore[assignment]
    method = config(named("w4a4"))._linear_method(layer.prefix, [str(layer.prefix)])
    with pytest.raises(UnsupportedLayerError, match="two 4-bit codes share a byte"):
        method.create_weights(layer, 5, [8], 10, 8, torch.float32, weight_loader=None)


def log_probabilities(path: str, answers: Any) -> None:
    """Of the tokens of `WINDOWS` by vLLM on two ranks."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams

    options: Any = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    engine = LLM(path, tensor_parallel_size=2, **options)
    prompts: Any = [{"prompt_token_ids": window} for window in WINDOWS]
    outputs: Any = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False))
    answers.put(
        [
            [scores[token].logprob for scores, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
            for output, window in zip(outputs, WINDOWS, strict=True)
        ]
    )
    engine.llm_engine.engine_core.shutdown()


@pytest.mark.timeout(900)
def test_a_whole_model_on_two_ranks_is_the_simulation_s(tmp_path: Path) -> None:
    """vLLM has no 4-bit KV cache, so neither has the oracle."""
    import torch.multiprocessing

    from quant.stream import log_likelihoods

    model = shutil.copytree(resolve_model("demo"), tmp_path / "demo")
    content = json.loads((model / "config.json").read_text())
    content["quantization_config"]["scheme"]["kv_bits"] = 16
    (model / "config.json").write_text(json.dumps(content))
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=log_probabilities, args=(str(model), answers))
    process.start()
    expected = np.concatenate(log_likelihoods(CheckpointReader(model), WINDOWS))
    found = np.concatenate(answers.get(timeout=600))
    process.join(60)
    process.kill()  # how vLLM ends is not what is tested
    assert math.exp(abs(found.mean() - expected.mean())) < 1.005
    # A sum in another order moves an input across a rounding boundary now and then, and that token's score with it.
    assert np.abs(found - expected).mean() < 0.05
