"""`osp info` and `osp eval` as a script sees them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from checkpoints import write_4bit, write_full_precision
from click.testing import CliRunner, Result
from safetensors import safe_open
from schemes import CASES, SCHEMES, SHAPES

from quant.format import Checkpoint, read_checkpoint, read_tokenizer
from quant.scheme import Scheme, named
from runtime.cli import main
from runtime.engine.reference_cache import PagedCache


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_info_of_a_4bit_model(quantized: Checkpoint) -> None:
    result = ask("info", quantized.path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "scheme": "w4a4",
        "settings": named("w4a4").to_dict(),
        "parameters": 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32) + 5 * 32 + 2 * 97 * 32,
        "layers": 2,
        "context": 64,
        # Half a byte a weight, and for each of 14 layers two scales of 32 bits: one of the weight, one of the input.
        "body_bits_per_weight": 4 + 14 * (32 + 32) / 21504,
        "bytes": {
            "body": 21504 // 2 + 14 * 8,
            "head": 2 * 97 * 32,
            "embedding": 2 * 97 * 32,
            "norms": 2 * 5 * 32,
            "kv_per_token": 2 * 2 * 2 * 8 * 2,
        },
        "quality": {"perplexity_16bit": 10.0, "perplexity": 10.5},
        "warning": None,
    }
    plain = ask("info", quantized.path).stdout
    assert "scheme      w4a4, 4.042 bits a weight of the body\n" in plain
    assert "sites       q, k, v, o, gate, up, down: 4-bit weights per tensor, 4-bit inputs per tensor\n" in plain
    assert "            head: 16-bit weights, 16-bit inputs\n" in plain
    assert "KV cache    128 bytes a token at 16 bit; the reference engine holds 32\n" in plain
    assert "quality     perplexity_16bit 10, perplexity 10.5\n" in plain


def test_weights_alone_have_one_scale_a_tensor(tmp_path: Path) -> None:
    root = write_4bit(tmp_path, scheme=named("w4a16"))
    assert json.loads(ask("info", root, "--json").stdout)["body_bits_per_weight"] == 4 + 14 * 32 / 21504


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_the_bytes_add_up_to_the_weight_file(tmp_path: Path, scheme: str, shape: str) -> None:
    root = write_4bit(tmp_path, scheme=SCHEMES[scheme], **SHAPES[shape])
    description = json.loads(ask("info", root, "--json").stdout)
    sizes = description["bytes"]
    with safe_open(root / "osp.safetensors", "numpy") as tensors:
        stored = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118 - not a dict
    assert sizes["body"] + sizes["head"] + sizes["embedding"] + sizes["norms"] == sum(stored.values())
    assert sizes["body"] == sum(size for name, size in stored.items() if "_proj" in name)
    assert sizes["head"] == sum(size for name, size in stored.items() if name.startswith("lm_head"))
    assert sizes["embedding"] == sum(size for name, size in stored.items() if "embed_tokens" in name)
    assert Scheme.from_dict(description["settings"]) == SCHEMES[scheme]
    assert description["scheme"] == SCHEMES[scheme].label


@pytest.mark.parametrize(("kv_bits", "bytes_per_head"), [(16, 16), (8, 8 + 3), (4, 4 + 3)])
def test_a_token_in_the_cache_has_codes_and_three_bytes_a_head(
    tmp_path: Path, kv_bits: int, bytes_per_head: int
) -> None:
    root = write_4bit(tmp_path, scheme=named("w4a4").changed(kv_bits=kv_bits))
    checkpoint = read_checkpoint(root)
    size = json.loads(ask("info", root, "--json").stdout)["bytes"]["kv_per_token"]
    assert size == 2 * 2 * 2 * bytes_per_head  # keys and values, layers, heads
    held = PagedCache(checkpoint.config, kv_bits, 1, 1).nbytes
    assert held == (2 * size if kv_bits == 16 else size)
    assert f"{size:,} bytes a token at {kv_bits} bit" in ask("info", root).stdout


def test_info_says_how_each_site_is_quantized(tmp_path: Path) -> None:
    plain = ask("info", write_4bit(tmp_path, scheme=SCHEMES["mixed sites"])).stdout
    for line in (
        "scheme      w4a4-kv8-head8+, ",
        "sites       q: 16-bit weights, 16-bit inputs",
        "            k, v, up: 4-bit weights per tensor, 4-bit inputs per tensor",
        "            o: 8-bit weights per tensor, 8-bit inputs per token",
        "            gate: 4-bit weights per channel, 4-bit inputs per tensor",
        "            down: 8-bit weights per tensor, 16-bit inputs",
        "            head: 8-bit weights per tensor, 8-bit inputs per tensor",
        "            embedding: 16-bit",
        "hadamard    ffn",
    ):
        assert f"\n{line}" in plain, plain


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
    data = ["--data", tmp_path / "a.txt", "--data", tmp_path / "b.jsonl"]
    result = ask("eval", quantized.path, *data, "--engine", "reference", "--json")
    report = json.loads(result.stdout)
    assert (report["tokens"], report["engine"], report["precision"]) == (4, "reference", "w4a4")
    assert report["perplexity"] > 1
    assert result.stderr == ""
    plain = ask("eval", quantized.path, "--data", tmp_path, "--engine", "reference").stdout
    assert f"{report['perplexity']:.4f} over 4 tokens" in plain


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


QUESTIONS = [{"context": "t1 t2", "choices": [" t3", " t4 t5", " t6"], "label": label} for label in (0, 1, 2)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return tmp_path / "colours.jsonl"


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_eval_of_a_task(quantized: Checkpoint, task: Path, engine: str) -> None:
    report = json.loads(ask("eval", quantized.path, "--task", task, "--engine", engine, "--json").stdout)
    # The same question with each of its answers marked as the right one.
    one_third = {"accuracy": 1 / 3, "accuracy_stderr": pytest.approx(1 / 3)}
    one_third |= {"accuracy_norm": 1 / 3, "accuracy_norm_stderr": pytest.approx(1 / 3)}
    assert report == {
        "perplexity": None,
        "tokens": None,
        "engine": engine,
        "precision": "w4a4",
        "tasks": [{"task": "colours", **one_third, "questions": 3}],
    }


def test_eval_of_text_and_tasks(quantized: Checkpoint, task: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t1 t2 t3 t4")
    (tmp_path / "one.jsonl").write_text(json.dumps(QUESTIONS[0]))
    data = ["--data", tmp_path / "a.txt", "--task", task, "--task", tmp_path / "one.jsonl"]
    arguments = [*data, "--engine", "reference"]
    report = json.loads(ask("eval", quantized.path, *arguments, "--json").stdout)
    assert report["tokens"] == 3
    assert [(result["task"], result["questions"]) for result in report["tasks"]] == [("colours", 3), ("one", 1)]
    lines = ask("eval", quantized.path, *arguments).stdout.splitlines()
    assert lines[0] == f"perplexity {report['perplexity']:.4f} over 3 tokens (reference engine, w4a4)"
    share = "0.3333 ± 0.3333"
    assert lines[1] == f"colours: accuracy {share}, per byte {share}, 3 questions (reference engine, w4a4)"
    assert re.fullmatch(r"one: accuracy [01]\.0000, per byte [01]\.0000, 1 question .*", lines[2])


def test_eval_of_nothing(quantized: Checkpoint) -> None:
    result = ask("eval", quantized.path)
    assert result.exit_code == 2
    assert "give --data, --task, or both" in result.stderr


def test_eval_without_torch_says_what_to_install(
    quantized: Checkpoint, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "quant.stream", raising=False)
    result = ask("eval", quantized.path, "--task", task, "--engine", "torch")
    assert result.exit_code == 1
    assert "needs torch, which is not installed; pip install 'osp-runtime[quant]'" in result.stderr


def test_mistakes_are_told_in_one_line(quantized: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("t1")
    (tmp_path / "bad.jsonl").write_text("{}")
    on_cuda = [quantized.path, "--data", tmp_path / "one.txt", "--onnx-provider", "cuda", "--engine"]
    for command, arguments, message in (
        ("info", ["no-such-model"], "no-such-model"),
        ("info", ["~nosuchuser/x"], "home directory"),
        ("info", ["x" * 300], "too long"),
        ("eval", ["x" * 300, "--data", tmp_path], "too long"),
        ("info", [tmp_path], "config.json is missing"),
        ("eval", [quantized.path, "--data", tmp_path / "absent.txt"], "absent.txt"),
        ("eval", [quantized.path, "--data", tmp_path / "one.txt"], "nothing to score"),
        ("eval", [quantized.path, "--data", tmp_path / "one.txt", "--engine", "tensorrt"], "no engine 'tensorrt'"),
        ("eval", [quantized.path, "--task", tmp_path / "bad.jsonl"], 'bad.jsonl:1: no "context"'),
        ("eval", [*on_cuda, "reference"], "no use to the engine reference; choose --engine onnx"),
        ("eval", [*on_cuda, "torch"], "no use to the engine torch; choose --engine onnx"),
        ("eval", [*on_cuda, "onnx"], "no CUDAExecutionProvider"),
    ):
        result = ask(command, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
