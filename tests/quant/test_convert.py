"""The pipeline and its command, end to end on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quant import arithmetic, convert
from quant.calibrate import calibrate
from quant.convert import quantize_checkpoint
from quant.format import read_checkpoint, sha256, write_json
from quant.llama import CheckpointError
from quant.model import load_model
from quant.perplexity import measure_perplexity
from quant.scheme import named
from quant.text import windows

W4A4 = named("w4a4")
SHAPES = {
    "own head, grouped queries, odd width": {},
    "tied": {"tie_word_embeddings": True},
    "one query head a key head": {"num_key_value_heads": 4},
    "float16": {"dtype": torch.float16},
    "float32, sharded": {"dtype": torch.float32, "max_shard_size": "8KB"},
    "smallest": {
        "hidden_size": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 1,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_checkpoint_becomes_four_bit(make_checkpoint, text_path, tmp_path, shape):
    path = make_checkpoint(**shape)
    report = quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    source, written = read_checkpoint(path), read_checkpoint(tmp_path / "out")
    assert written.scheme == W4A4
    assert written.config == source.config
    assert written.provenance == report

    for name, weight in source.linears.items():
        linear, site = written.linears[name], report["quantization"]["sites"][name]
        np.testing.assert_array_equal(linear.codes, arithmetic.quantize(weight, linear.weight_scale))
        errors = weight.astype(np.float64) - linear.codes * np.float64(linear.weight_scale)
        assert site["mse"] == pytest.approx(np.square(errors).mean())
        assert site["clip_ratio"] == pytest.approx(7 * linear.weight_scale / site["absmax"])
        assert site["absmax"] == np.abs(weight).max()
        assert site["input_clip_ratio"] == pytest.approx(7 * linear.input_scale / site["input_absmax"])
    for name, values in source.floats.items():
        np.testing.assert_array_equal(written.floats[name], values.astype(written.floats[name].dtype))


def test_the_report_says_what_was_done(checkpoint_path, text_path, tmp_path):
    training = {"recipe": "osp", "tokens": 123}
    write_json(checkpoint_path / "osp.json", {"training": training, "unrelated": 1})
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path])
    text = text_path.read_text()
    calibrated = len(text) - len(text) // 5
    scored = sum(len(text[calibrated:][i : i + 32]) - 1 for i in range(0, len(text) - calibrated, 32))
    assert report["training"] == training
    assert "unrelated" not in report
    assert report["tokenizer_sha256"] == sha256(checkpoint_path / "tokenizer.json")
    assert report["quantization"]["scheme"] == "w4a4"
    assert report["quantization"]["calibration"] == {
        "text": ["text.txt"],
        "sha256": sha256(text_path),
        "tokens": calibrated,
    }
    quality = report["quality"]
    assert (quality["text"], quality["sha256"]) == ("held back from calibration", sha256(text_path))
    assert quality["tokens"] == scored
    assert quality["ratio"] == quality["perplexity_w4a4"] / quality["perplexity_16bit"]


def test_held_back_text_is_not_calibrated_on(checkpoint_path, text_path, tmp_path, tokenizer):
    text_path.write_text("abcd" * 60 + "XYZ!" * 15)
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path])
    source = load_model(read_checkpoint(checkpoint_path))
    seen = calibrate(source, windows([tokenizer.encode("abcd" * 60).ids], 32))
    held = list(windows([tokenizer.encode("XYZ!" * 15).ids], 32))
    for name, site in report["quantization"]["sites"].items():
        assert site["input_absmax"] == seen[name].absmax
    assert report["quality"]["perplexity_16bit"] == measure_perplexity(source, held).value
    written = load_model(read_checkpoint(tmp_path / "out"))
    assert report["quality"]["perplexity_w4a4"] == measure_perplexity(written, held).value


def test_calibration_has_enough_at_some_point(checkpoint_path, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 100)
    monkeypatch.setattr(convert, "CALIBRATION_TOKENS", 150)
    texts = [tmp_path / f"{name}.txt" for name in "abc"]
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=texts)
    assert report["quantization"]["calibration"]["tokens"] == 150 - 30
    assert report["quality"]["tokens"] == 29  # a window of 30


def test_text_to_evaluate_on_leaves_calibration_whole(checkpoint_path, text_path, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("Something else entirely.")
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], heldout=[other])
    assert report["quantization"]["calibration"]["tokens"] == len(text_path.read_text())
    assert report["quality"]["text"] == ["other.md"]
    assert report["quality"]["sha256"] == sha256(other)
    assert report["quality"]["tokens"] == 23


def test_text_is_not_cut_by_what_the_tokenizer_file_asks_for(checkpoint_path, text_path, tmp_path, tokenizer):
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(checkpoint_path / "tokenizer.json"))
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], heldout=[text_path])
    length = len(text_path.read_text())
    assert report["quantization"]["calibration"]["tokens"] == length
    assert report["quality"]["tokens"] == length - -(-length // 32)


def test_the_same_input_gives_the_same_bytes(checkpoint_path, text_path, tmp_path):
    for name in ("one", "two"):
        quantize_checkpoint(checkpoint_path, tmp_path / name, W4A4, calibration=[text_path])
    for file in ("osp.safetensors", "osp.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_a_server_needs_is_copied(checkpoint_path, text_path, tmp_path):
    (checkpoint_path / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint_path / "notes.txt").write_text("private")
    quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path])
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint_path / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()


# ---- nothing is left behind ----


def test_a_directory_with_something_in_it_is_left_alone(checkpoint_path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        quantize_checkpoint(checkpoint_path, out, W4A4)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        quantize_checkpoint(checkpoint_path, out / "precious", W4A4)
    assert [file.name for file in out.iterdir()] == ["precious"]


def test_an_empty_directory_is_filled_and_parents_are_made(checkpoint_path, text_path, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        quantize_checkpoint(checkpoint_path, out, W4A4, calibration=[text_path])
        assert read_checkpoint(out).precision == "w4a4"


def test_failing_half_way_leaves_nothing(checkpoint_path, text_path, tmp_path, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("the disk is full")

    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(convert, "_quality", fail)
    for out in (tmp_path / "out", tmp_path / "new" / "parents" / "out"):
        with pytest.raises(RuntimeError, match="the disk is full"):
            quantize_checkpoint(checkpoint_path, out, W4A4, calibration=[text_path])
    assert set(tmp_path.rglob("*")) == before


def test_a_tokenizer_that_cannot_be_used_is_named(checkpoint_path, tmp_path):
    tokenizer = json.loads((checkpoint_path / "tokenizer.json").read_text())
    write_json(checkpoint_path / "tokenizer.json", tokenizer | {"pre_tokenizer": {"type": "Unheard"}})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4)
