"""`osp quantize --tune-steps`: tuning and quantization in one command."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from quant import finish
from quant.cli import quantize
from quant.convert import quantize_checkpoint
from quant.format import read_checkpoint
from quant.scheme import named

OPTIONS = ["--tune-steps", "4", "--tune-lr", "0.001", "--kv", "4"]


@pytest.fixture
def run(checkpoint_path, text_path, tmp_path):
    """`run("--option", …)` -> the result of `osp quantize`, which writes into `tmp_path / "out"`."""

    def invoke(*arguments):
        texts = ["--calibration", str(text_path), "--data", str(text_path)]
        return CliRunner().invoke(
            quantize, [str(checkpoint_path), "--out", str(tmp_path / "out"), *texts, *OPTIONS, *arguments]
        )

    return invoke


def test_one_command_tunes_and_quantizes(run, checkpoint_path, text_path, tmp_path):
    result = run("--json", "--save-tuned", str(tmp_path / "tuned"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert 1 <= report["tuning"]["steps"] <= 4  # it stops where it no longer helps
    assert report["tuning"]["settings"]["matrix_lr"] == 0.001
    quality, scheme = report["quality"], named("w4a4").changed(kv_bits=4)
    untuned = quantize_checkpoint(checkpoint_path, tmp_path / "untuned", scheme, calibration=[text_path])["quality"]
    assert quality["perplexity_16bit"] == untuned["perplexity_16bit"]
    assert quality["perplexity_untuned"] == untuned["perplexity"]
    assert quality["ratio"] == quality["perplexity"] / quality["perplexity_16bit"]

    again = quantize_checkpoint(tmp_path / "tuned", tmp_path / "again", scheme, calibration=[text_path])
    assert again["quality"]["perplexity_16bit"] == quality["perplexity_16bit_tuned"]
    assert again["quality"]["perplexity"] == quality["perplexity"]
    one, two = (load_file(tmp_path / name / "osp.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert read_checkpoint(tmp_path / "out").scheme == scheme
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_an_interrupted_tuning_goes_on(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "tune", interrupted)
        assert run().exit_code != 0
    assert not (tmp_path / "out").exists()
    refused = run()
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    assert run("--resume").exit_code == 0
    assert (tmp_path / "out" / "osp.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tune-steps", "5"], "go together"),
        (["--data", "text.txt"], "go together"),
        (["--save-tuned", "tuned"], "without --tune-steps"),
        (["--tune-lr", "0.1"], "without --tune-steps"),
    ],
)
def test_options_that_belong_together(checkpoint_path, tmp_path, arguments, words):
    result = CliRunner().invoke(quantize, [str(checkpoint_path), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_what_would_be_overwritten_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "precious").touch()
    result = run("--save-tuned", str(tmp_path / "tuned"))
    assert result.exit_code == 1
    assert "tuned" in result.output
    assert (tmp_path / "tuned" / "precious").exists()
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_is_none_is_an_error_in_words(run, tmp_path):
    result = run("--tune-lr", "-1")
    assert result.exit_code == 1
    assert "matrix_lr must be a positive number" in result.output
