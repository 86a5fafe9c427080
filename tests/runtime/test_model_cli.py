"""`osp info` and `osp eval` as a script sees them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import write_full_precision
from click.testing import CliRunner, Result

from quant.format import Checkpoint, read_tokenizer
from runtime.cli import main


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_info_of_a_4bit_model(quantized: Checkpoint) -> None:
    result = ask("info", quantized.path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "scheme": "w4a4",
        "parameters": 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32) + 5 * 32 + 2 * 97 * 32,
        "layers": 2,
        "context": 64,
        # Half a byte a weight, and 8 bytes of scales for each of 14 layers.
        "body_bits_per_weight": pytest.approx(4 + 8 * 14 * 8 / 21504),
        "bytes": {
            "body": 21504 // 2 + 14 * 8,
            "head": 2 * 97 * 32,
            "embedding": 2 * 97 * 32,
            "norms": 2 * 5 * 32,
            "kv_per_token": 2 * 2 * 2 * 8 * 2,
        },
        "quality": {"perplexity_16bit": 10.0, "perplexity_w4a4": 10.5},
        "warning": None,
    }
    plain = ask("info", quantized.path).stdout
    assert "w4a4" in plain
    assert "128 bytes a token" in plain
    assert "perplexity_w4a4 10.5" in plain


def test_info_of_a_tied_full_precision_model(tmp_path: Path) -> None:
    root = write_full_precision(tmp_path, tie_word_embeddings=True)
    description = json.loads(ask("info", root, "--json").stdout)
    assert description["scheme"] == "float32"
    assert description["body_bits_per_weight"] == 32
    assert description["bytes"]["head"] == 0
    assert description["quality"] is None
    assert "tied to the embedding" in ask("info", root).stdout


def test_info_passes_on_the_quantizers_warning(quantized: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(quantized.path, tmp_path / "model")
    provenance = {"quality": {"ratio": 40.123456, "tokens": 7}, "warning": "this model is not outlier-safe"}
    (tmp_path / "model" / "osp.json").write_text(json.dumps(provenance))
    assert json.loads(ask("info", tmp_path / "model", "--json").stdout)["warning"] == provenance["warning"]
    plain = ask("info", tmp_path / "model").stdout
    assert "warning     this model is not outlier-safe" in plain
    assert "ratio 40.123, tokens 7" in plain


@pytest.mark.parametrize("quality", ["good", ["good"], 5, None])
def test_info_of_a_quality_that_is_no_object(quantized: Checkpoint, tmp_path: Path, quality: object) -> None:
    model = shutil.copytree(quantized.path, tmp_path / "model")
    (model / "osp.json").write_text(json.dumps({"quality": quality}))
    assert json.loads(ask("info", model, "--json").stdout)["quality"] is None
    assert "quality     not recorded" in ask("info", model).stdout


def test_eval(quantized: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t1 t2 t3 t4")
    (tmp_path / "b.jsonl").write_text('{"text": "t5 t6"}\n')
    result = ask("eval", quantized.path, "--data", tmp_path / "a.txt", "--data", tmp_path / "b.jsonl", "--json")
    report = json.loads(result.stdout)
    assert (report["tokens"], report["engine"], report["precision"]) == (4, "reference", "w4a4")
    assert report["perplexity"] > 1
    assert result.stderr == ""
    assert f"{report['perplexity']:.4f} over 4 tokens" in ask("eval", quantized.path, "--data", tmp_path).stdout


def test_eval_scores_whole_documents_whatever_tokenizer_json_says(quantized: Checkpoint, tmp_path: Path) -> None:
    model = shutil.copytree(quantized.path, tmp_path / "model")
    (model / "osp.json").unlink()
    tokenizer = read_tokenizer(model)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(model / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("t1 t2 t3 t4 t5")
    report = json.loads(ask("eval", model, "--data", tmp_path / "a.txt", "--json").stdout)
    assert report["tokens"] == 4


def test_mistakes_are_told_in_one_line(quantized: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("t1")
    for command, arguments, message in (
        ("info", ["no-such-model"], "no-such-model"),
        ("info", ["~nosuchuser/x"], "home directory"),
        ("info", ["x" * 300], "too long"),
        ("eval", ["x" * 300, "--data", tmp_path], "too long"),
        ("info", [tmp_path], "config.json is missing"),
        ("eval", [quantized.path, "--data", tmp_path / "absent.txt"], "absent.txt"),
        ("eval", [quantized.path, "--data", tmp_path / "one.txt"], "nothing to score"),
        ("eval", [quantized.path, "--data", tmp_path / "one.txt", "--engine", "native"], "no engine 'native'"),
    ):
        result = ask(command, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
