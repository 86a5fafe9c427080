"""Tuning: what it learns, what it leaves behind, and that it can be interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quant import tuning
from quant.convert import quantize_checkpoint
from quant.format import CheckpointReader, read_checkpoint, write_json
from quant.model import load_model
from quant.scheme import SchemeError, named
from quant.text import TextError
from quant.trainable import LearnedScale
from quant.tune_settings import TuneSettings, TuningError
from quant.tuned_scales import read_scales
from quant.tuning_text import TuningText

SCHEME = named("w4a4").changed(hadamard="ffn", kv_bits=4)
SHAPE = {"intermediate_size": 40}
SETTINGS = TuneSettings(steps=12, batch_tokens=64, matrix_lr=1e-3, table_lr=1e-3, patience=20)


def tune(source, start, out, paths, settings, **options):
    text = TuningText.for_model(source, paths, settings.longest_window, settings.seed)
    return tuning.tune(source, start, out, text, settings, **options)


@pytest.fixture
def start(make_checkpoint, text_path, tmp_path):
    """(source, its quantized form)"""

    def make(scheme=SCHEME, **shape):
        source = make_checkpoint(**(SHAPE | shape))
        quantize_checkpoint(source, tmp_path / "start", scheme, calibration=[text_path])
        return source, tmp_path / "start"

    return make


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"dtype": torch.float32}], ids=str)
def test_the_quantized_model_gets_better(start, text_path, tmp_path, tokenizer, shape):
    source, quantized = start(**shape)
    report = tune(source, quantized, tmp_path / "tuned", [text_path], SETTINGS)
    assert report["held_back_divergence"] < 0.9 * report["held_back_divergence_before"]
    assert report["tokens_seen"] == 12 * 64

    rounded = quantize_checkpoint(tmp_path / "tuned", tmp_path / "out", SCHEME, calibration=[text_path])
    assert rounded["tuning"] == report
    ids = torch.tensor(tokenizer.encode(text_path.read_text()).ids[:30])[None]
    with torch.no_grad():
        wanted, untuned, tuned = (
            load_model(CheckpointReader(path))(ids).logits.log_softmax(-1)
            for path in (source, quantized, tmp_path / "out")
        )
    distance = partial(torch.nn.functional.kl_div, target=wanted, log_target=True, reduction="sum")
    assert distance(tuned) < distance(untuned)


def test_what_is_written_is_the_source_with_other_weights(start, text_path, tmp_path):
    source, quantized = start()
    write_json(source / "osp.json", {"training": {"recipe": "osp"}})
    tune(source, quantized, tmp_path / "tuned", [text_path], SETTINGS)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    for name in before:
        assert torch.equal(before[name], after[name]) == ("norm" in name), name
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "tuned" / file).read_bytes() == (source / file).read_bytes()
    provenance = json.loads((tmp_path / "tuned" / "osp.json").read_text())
    assert provenance["training"] == {"recipe": "osp"}
    assert not (tmp_path / "tuned" / tuning.STATE_FILE).exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").dtype == torch.bfloat16


@pytest.mark.parametrize("length", [8, 32])
def test_the_weights_unrounded_learn_too_however_few_windows_a_batch_has(
    start, text_path, tmp_path, monkeypatch, edit_config, length
):
    source, quantized = start(max_position_embeddings=length)
    calls = []
    original = tuning.unrounded
    monkeypatch.setattr(tuning, "unrounded", lambda model: calls.append(1) or original(model))
    tune(source, quantized, tmp_path / "tuned", [text_path], replace(SETTINGS, steps=3, batch_tokens=32))
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["w4a4", "w4a4-token", "w4a8", "w4a16"])
def test_rounding_again_gives_the_same_codes(start, text_path, tmp_path, name):
    source, quantized = start(named(name))
    tune(source, quantized, tmp_path / "tuned", [text_path], SETTINGS)
    scales = read_scales(CheckpointReader(tmp_path / "tuned"), named(name))
    for out in ("one", "two"):
        quantize_checkpoint(tmp_path / "tuned", tmp_path / out, named(name), calibration=[text_path])
    assert (tmp_path / "one/osp.safetensors").read_bytes() == (tmp_path / "two/osp.safetensors").read_bytes()
    written, weights = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "tuned").linears
    for module, linear in written.linears.items():
        scale = scales[f"{module}.weight_scale"]
        np.testing.assert_array_equal(linear.weight.scale, scale)
        # An oracle of its own: rint and clip in float64 give these codes unless a quotient is a tie in float32 only.
        quotients = weights[module].astype(np.float64) / scale[:, None]
        off = np.abs(linear.weight.codes - np.clip(quotients, -8, 7))
        assert off.max() <= 0.5 + 1e-6


def test_an_interrupted_run_goes_on_to_the_same_result(start, text_path, tmp_path, monkeypatch):
    source, quantized = start()
    tune(source, quantized, tmp_path / "whole", [text_path], SETTINGS)

    step = tuning._Run._train_step

    def interrupted(run):
        if run.step == 7:
            raise KeyboardInterrupt
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(tuning._Run, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(source, quantized, tmp_path / "parts", [text_path], SETTINGS)
    with pytest.raises(TuningError, match="other settings"):
        tune(source, quantized, tmp_path / "parts", [text_path], replace(SETTINGS, steps=13), resume=True)
    tune(source, quantized, tmp_path / "parts", [text_path], SETTINGS, resume=True)
    for file in ("model.safetensors", "scales.safetensors", "osp.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_it_stops_when_it_no_longer_helps_and_keeps_the_best(start, text_path, tmp_path):
    source, quantized = start()
    hopeless = replace(SETTINGS, steps=400, matrix_lr=3.0, table_lr=3.0, patience=2)
    report = tune(source, quantized, tmp_path / "tuned", [text_path], hopeless)
    assert report["steps"] < 400
    assert report["held_back_divergence"] <= report["held_back_divergence_before"]


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(start, text_path, tmp_path, monkeypatch):
    source, quantized = start()
    forward = LearnedScale.forward
    monkeypatch.setattr(LearnedScale, "forward", lambda self: forward(self) * float("nan"))
    with pytest.raises(TuningError, match=r"step 1: loss nan.*--tune-lr"):
        tune(source, quantized, tmp_path / "tuned", [text_path], SETTINGS)
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_what_cannot_be_tuned_is_refused(start, text_path, tmp_path):
    source, quantized = start(SCHEME.changed(hadamard="full"))
    with pytest.raises(SchemeError, match="fully rotated"):
        tune(source, quantized, tmp_path / "tuned", [text_path], SETTINGS)
    with pytest.raises(SchemeError, match="is not quantized"):
        tune(source, source, tmp_path / "tuned", [text_path], SETTINGS)
    assert not (tmp_path / "tuned").exists()


def test_too_little_text_is_refused(start, tmp_path):
    source, quantized = start()
    short = tmp_path / "short.txt"
    short.write_text("brief")
    with pytest.raises(TextError, match="5 tokens; at least"):
        tune(source, quantized, tmp_path / "tuned", [short], SETTINGS)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"matrix_lr": 0.0}, {"table_lr": float("nan")}, {"patience": 0}], ids=str
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(TuningError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)
