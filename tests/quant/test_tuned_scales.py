"""Learned scales: used where they fit, left where they do not, and refused where the file is wrong."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quant import arithmetic
from quant.convert import quantize_checkpoint
from quant.format import CheckpointReader, read_checkpoint, write_json
from quant.llama import CheckpointError
from quant.scheme import named
from quant.tuned_scales import SCALES_FILE, differing_settings, read_scales, write_scales

W4A4, TOKEN = named("w4a4"), named("w4a4-token")


def arbitrary_scales(config, scheme):
    """Scales that no search would find; layers that read one tensor share that of the input."""
    random, scales, inputs = np.random.default_rng(0), {}, {}
    for name, (rows, _) in config.linear_shapes().items():
        linear = scheme.linear(name)
        if linear.weight_bits < 16:
            count = rows if linear.weight_granularity == "channel" else 1
            scales[f"{name}.weight_scale"] = random.uniform(0.05, 0.3, count)
        if linear.static:
            tensor = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            scales[f"{name}.input_scale"] = inputs.setdefault(tensor, random.uniform(0.05, 0.9, 1))
    return {name: arithmetic.round_to_bfloat16(scale.astype(np.float32)) for name, scale in scales.items()}


@pytest.fixture
def tuned(make_checkpoint):
    """`tuned(scheme)`: a checkpoint with learned scales for it."""

    def make(scheme):
        path = make_checkpoint(intermediate_size=40)
        write_json(path / "osp.json", {"tuning": {"scheme": scheme.to_dict(), "steps": 1}})
        write_scales(path, arbitrary_scales(CheckpointReader(path).config, scheme))
        return path

    return make


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", [W4A4, TOKEN, W4A4.changed(kv_bits=4, hadamard="ffn")], ids=lambda s: s.label)
def test_learned_scales_are_those_of_the_quantized_model(tuned, text_path, tmp_path, scheme, weights):
    path = tuned(scheme)
    wanted = arbitrary_scales(CheckpointReader(path).config, scheme)
    asked = scheme.changed(head=8, embedding_bits=4)  # of which tuning knows nothing
    report = quantize_checkpoint(path, tmp_path / "out", asked, calibration=[text_path], weights=weights)
    written = load_file(tmp_path / "out" / "osp.safetensors")
    assert all(written[name].tobytes() == scale.tobytes() for name, scale in wanted.items())
    if weights == "rtn":
        for name, linear in read_checkpoint(tmp_path / "out").linears.items():
            if not linear.rotated:
                weight_MK = CheckpointReader(path).linear(name)
                codes_MK = arithmetic.quantize(weight_MK, wanted[f"{name}.weight_scale"][:, None])
                np.testing.assert_array_equal(linear.weight.codes, codes_MK)
    assert report["quantization"]["scales"] == "learned"
    notes = report["quantization"]["notes"]
    assert [("GPTQ's, not those that the model was tuned with" in note) for note in notes] == [True] * (
        weights == "gptq"
    )
    assert report["tuning"]["steps"] == 1


def test_scales_for_another_scheme_are_not_used_and_that_is_said(tuned, text_path, tmp_path):
    path = tuned(W4A4)
    asked = W4A4.changed(kv_bits=8, down={"activation_bits": 8})
    report = quantize_checkpoint(path, tmp_path / "with", asked, calibration=[text_path])
    (path / SCALES_FILE).unlink()
    quantize_checkpoint(path, tmp_path / "without", asked, calibration=[text_path])
    files = [(tmp_path / name / "osp.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
    assert report["quantization"]["scales"] == "searched"
    (note,) = report["quantization"]["notes"]
    assert "scales.safetensors is for another scheme (w4a4; it differs in down, kv_bits): scales searched" in note


def test_what_decides_whether_scales_fit():
    assert differing_settings(W4A4, W4A4.changed(head=8, embedding_bits=8)) == []
    assert differing_settings(W4A4, W4A4.changed(hadamard="ffn", v={"weight_bits": 4})) == ["hadamard"]
    assert differing_settings(W4A4, TOKEN) == ["q", "k", "v", "o", "gate", "up", "down"]


def test_without_the_file_there_are_no_scales(checkpoint_path):
    assert read_scales(CheckpointReader(checkpoint_path), W4A4) is None


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: scales.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
        (
            lambda scales: scales.update({"lm_head.weight_scale": np.ones(1, np.float32)}),
            r"unexpected tensors: \['lm_head",
        ),
        (lambda scales: scales.update({f"{Q}.input_scale": np.ones(2, np.float32)}), r"shape \[2\], expected \[1\]"),
        (
            lambda scales: scales.update({f"{Q}.input_scale": np.ones(1, np.float32)}),
            "for one tensor and must be the same",
        ),
        (lambda scales: scales.update({f"{Q}.input_scale": np.ones(1, np.float64)}), "float64, not float32"),
        (lambda scales: scales.update({f"{Q}.input_scale": np.ones(1, ml_dtypes.bfloat16)}), "bfloat16, not float32"),
        *(
            (
                lambda scales, value=value: scales.update({f"{Q}.input_scale": np.array([value], np.float32)}),
                "is not a positive, normal bfloat16 number",
            )
            for value in (0, -1, np.nan, np.inf, 0.3, 2.0**-127)
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(tuned, change, message):
    path = tuned(W4A4)
    scales = load_file(path / SCALES_FILE)
    change(scales)
    save_file(scales, path / SCALES_FILE)
    with pytest.raises(CheckpointError, match=message):
        read_scales(CheckpointReader(path), W4A4)
    if "number" in message or "float" in message:
        with pytest.raises(CheckpointError, match=message):
            write_scales(path, scales)


def test_a_damaged_file_and_a_missing_scheme_are_refused(tuned):
    path = tuned(W4A4)
    whole = (path / SCALES_FILE).read_bytes()
    (path / SCALES_FILE).write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"scales\.safetensors cannot be read"):
        read_scales(CheckpointReader(path), W4A4)
    (path / SCALES_FILE).write_bytes(whole)
    recorded = json.loads((path / "osp.json").read_text())
    for content in ({}, {"tuning": 5}, {"tuning": {"scheme": "w4a4"}}):
        write_json(path / "osp.json", content)
        with pytest.raises(CheckpointError, match=r"osp\.json has no tuning\.scheme"):
            read_scales(CheckpointReader(path), W4A4)
    recorded["tuning"]["scheme"]["kv_bits"] = 5
    write_json(path / "osp.json", recorded)
    with pytest.raises(CheckpointError, match=r"tuning\.scheme: kv_bits is 5"):
        read_scales(CheckpointReader(path), W4A4)
