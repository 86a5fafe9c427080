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


@pytest.mark.parametrize("place", ["out", "out/tuned", "."])
def test_the_tuned_checkpoint_and_the_quantized_one_lie_side_by_side(run, tmp_path, place):
    result = run("--save-tuned", str(tmp_path / place))
    assert result.exit_code == 1
    assert "side by side" in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tuning").exists()


def test_work_that_was_begun_with_something_else_is_not_gone_on_with(run, text_path, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "tune", interrupted)
        stopped = run()
    assert "go on with --resume" in stopped.output
    other = tmp_path / "other.txt"
    other.write_text(text_path.read_text() * 2)
    for arguments, words in (
        (["--kv", "8"], "scheme"),
        (["--data", str(other)], "tuning text"),
        (["--clip", "p2.4"], "options"),
    ):
        refused = run("--resume", *arguments)
        assert refused.exit_code == 1
        assert words in refused.output
    assert run("--resume").exit_code == 0


def test_what_cannot_be_tuned_is_refused_before_any_work(run, tmp_path):
    for arguments, words in (
        (["--hadamard", "full"], "fully rotated"),
        (["--data", str(tmp_path / "none.txt")], "none.txt"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert words in result.output
        assert not (tmp_path / ".out.tuning").exists()


def test_a_learning_rate_that_is_none_is_an_error_in_words(run, tmp_path):
    result = run("--tune-lr", "-1")
    assert result.exit_code == 1
    assert "matrix_lr must be a positive number" in result.output
