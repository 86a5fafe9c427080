"""What the peers compute, where they are installed, against numpy in float64."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.peer_environments import PEERS, Peer
from benchmarks.peers import BUILD, ROOT, start_worker
from benchmarks.random_int4 import head_matrix, layer_matrix, random_nibbles
from trainer.config import ModelConfig

MODEL = ModelConfig(96, 64, 160, num_layers=2, num_heads=2, context_length=64)
COMPUTE = {
    "openvino": "from benchmarks.openvino_worker import *; products = OpenVinoProducts(model, 1)",
    "onnxruntime": "from benchmarks.onnxruntime_worker import *; graph = Path(folder, 'graph.onnx'); "
    "write_graph(graph, model); products = OnnxRuntimeProducts(graph, 1)",
}


def installed(name: str) -> Peer:
    if not PEERS[name].installed(BUILD):
        pytest.skip(f"{name} is not installed: python -m benchmarks.peers --install-only")
    return PEERS[name]


def logits_float64(x_ND: NDArray[np.float32], peer: str) -> NDArray[np.float64]:
    """[N, V], with weights drawn in the worker's order and read as its format has them."""
    rng = np.random.default_rng(0)

    def product(x_NK: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        matrix = head_matrix(MODEL) if name == "head" else layer_matrix(MODEL, name)
        blocked = peer == "onnxruntime"
        K = -(-matrix.K // 128) * 128 if blocked else matrix.K
        packed = random_nibbles(rng, matrix.N * K // 2, zero=8 if blocked else 0)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(matrix.N, K)[:, : matrix.K].astype(int)
        codes_NK = nibbles - 8 if blocked else np.where(nibbles > 7, nibbles - 16, nibbles)
        return x_NK @ codes_NK.T * matrix.scale

    h_ND = x_ND.astype(np.float64)
    for _ in range(MODEL.num_layers):
        h_ND = product(sum(product(h_ND, name) for name in ("q", "k", "v")), "o")
        h_ND = product(sum(product(h_ND, name) for name in ("gate", "up")), "down")
    return product(h_ND, "head")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_chain_has_every_product(name: str, tmp_path: Path) -> None:
    x_ND = np.random.default_rng(7).standard_normal((5, MODEL.hidden_size), np.float32)
    np.save(tmp_path / "x.npy", x_ND)
    code = f"""
import sys; from trainer.config import ModelConfig
folder, model = sys.argv[1], {MODEL!r}
{COMPUTE[name]}
x = np.load(folder + "/x.npy")
np.savez(folder + "/logits.npz", all=products(x, 5).copy(), last=products(x, 1).copy(), one=products(x[:1], 1).copy())
"""
    subprocess.run([installed(name).python(BUILD), "-c", code, tmp_path], cwd=ROOT, check=True, timeout=120)
    logits = np.load(tmp_path / "logits.npz")
    expected_NV = logits_float64(x_ND, name)
    for key, rows in (("all", slice(None)), ("last", slice(4, None)), ("one", slice(1))):
        assert logits[key].shape == expected_NV[rows].shape
        error = np.linalg.norm(logits[key] - expected_NV[rows]) / np.linalg.norm(expected_NV[rows])
        assert error < 0.05, key  # seven int8 roundings of activations, or fewer


@pytest.mark.parametrize("name", ["llama.cpp", "openvino", "onnxruntime"])
def test_a_worker_measures(name: str) -> None:
    peer = installed(name)
    with start_worker(peer, "tiny", 1) as worker:
        for batch in (1, 16):
            request = {"measure": "decode", "batch": batch, "context": 0, "tokens": 2}
            assert worker.ask(request)["tok_s"] > 1
        assert worker.ask({"measure": "prefill", "tokens": 64})["tok_s"] > 1
        if peer.whole_model:
            request = {"measure": "decode", "batch": 2, "context": 600, "tokens": 2}
            assert [worker.ask(request)["tok_s"] > 1 for _ in range(2)] == [True, True]
