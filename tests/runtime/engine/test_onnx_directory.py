"""An exported directory: served as the checkpoint is, and refused where it is not what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.format import Checkpoint
from quant.llama import CheckpointError
from runtime.engine.onnx import OnnxRunner
from runtime.engine.registry import load_runner
from runtime.engine.runner import SequenceSlice

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx

from quant.export_onnx import export_onnx


@pytest.fixture
def exported(quantized: Checkpoint, tmp_path: Path) -> Path:
    export_onnx(quantized.path, tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["quantized", "full_precision"])
def test_the_graph_is_valid_and_says_where_it_comes_from(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, device: str
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(source)
    export_onnx(checkpoint.path, tmp_path / "exported", device)
    graph = str(tmp_path / "exported" / "model.onnx")
    onnx.checker.check_model(graph)
    model = onnx.load(graph, load_external_data=False)
    assert (model.ir_version, {opset.domain: opset.version for opset in model.opset_import}) == (
        10,
        {"": 21, "com.microsoft": 1},
    )
    assert any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in model.graph.initializer)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["osp_precision"] == checkpoint.precision
    provenance = checkpoint.path / "osp.json"
    expected = json.loads(provenance.read_text("utf-8")) if provenance.exists() else {}
    assert json.loads(metadata["osp.json"]) == expected


def logits(runner: Any) -> Any:
    return runner.step([SequenceSlice(np.arange(20, dtype=np.int32), 0, np.zeros(1, np.int32), 20)]).rows()


def test_it_computes_what_the_checkpoint_does(
    quantized: Checkpoint, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(OnnxRunner(quantized.path, threads=1))
    monkeypatch.setitem(sys.modules, "onnx", None)  # which nobody needs who only runs it
    runner = load_runner("auto", exported)
    assert (runner.info.engine, runner.info.precision) == ("onnx", quantized.precision)
    np.testing.assert_array_equal(logits(runner), expected)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_record(root: Path, **changes: Any) -> None:
    provenance = json.loads((root / "osp.json").read_text())
    provenance["export"] |= changes
    (root / "osp.json").write_text(json.dumps(provenance))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: flip_a_bit(root / "model.onnx"), r"model\.onnx is not the file that was exported: its SHA-256"),
        (lambda root: flip_a_bit(root / "model.onnx.data"), r"model\.onnx\.data is not the file that was exported"),
        (lambda root: (root / "model.onnx.data").unlink(), r"model\.onnx\.data is missing"),
        (lambda root: (root / "osp.json").unlink(), "was not made by `osp export --format onnx`"),
        (lambda root: (root / "config.json").unlink(), r"config\.json is missing"),
        (lambda root: change_record(root, format="compressed-tensors"), "was not made by"),
        (lambda root: change_record(root, version=2), "export version 2; this release knows version 1"),
        (lambda root: change_record(root, sha256="none"), r"osp\.json records None"),
    ],
)
def test_what_is_damaged_is_refused(exported: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(exported)
    with pytest.raises(CheckpointError, match=words) as caught:
        OnnxRunner(exported)
    assert str(exported) in str(caught.value)


def test_a_graph_that_onnx_runtime_cannot_load(exported: Path) -> None:
    """As the next release of it may find one to be; the record says that the file is whole."""
    from quant.files import sha256

    (exported / "model.onnx").write_bytes(b"no graph")
    hashes = {name: sha256(exported / name) for name in ("model.onnx", "model.onnx.data")}
    change_record(exported, sha256=hashes)
    with pytest.raises(CheckpointError, match=r"ONNX Runtime [\d.]+ cannot load the graph"):
        OnnxRunner(exported)
