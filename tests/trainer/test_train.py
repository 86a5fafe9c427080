import hashlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import export
from trainer.checkpoints import checkpoints
from trainer.cli import train as train_command
from trainer.config import ConfigError, preset
from trainer.data import prepare
from trainer.loop import Trainer
from trainer.model import OSPModel
from trainer.train import train

TINY = preset("tiny", steps=24)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A short finished run, stored in float32."""
    directory = tmp_path_factory.mktemp("run")
    return directory, train([corpus], directory, TINY, dtype=torch.float32, quiet=True)


def test_the_loss_falls_and_the_log_says_so(finished):
    directory, report = finished
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["step"] == 24
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert report["held_out_loss"] < 6.0 < torch.log(torch.tensor(512.0))
    assert report["tokens_seen"] == 24 * TINY.batch_tokens


def test_the_export_loads_without_remote_code_and_computes_the_same(finished):
    directory, _ = finished
    config = json.loads((directory / "final" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    llama = AutoModelForCausalLM.from_pretrained(directory / "final")
    tokenizer = AutoTokenizer.from_pretrained(directory / "final")
    model = OSPModel(TINY.model, "osp")
    model.load_state_dict(torch.load(checkpoints(directory)[-1], weights_only=True)["model"])
    ids = tokenizer("The value of the expression", return_tensors="pt").input_ids
    assert ids[0, 0] == llama.config.bos_token_id == llama.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_what_is_exported_can_be_read_by_others(finished):
    directory, _ = finished
    modes = {file.name: file.stat().st_mode for file in (directory / "final").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_osp_json_says_where_the_model_comes_from(finished):
    directory, report = finished
    osp = json.loads((directory / "final" / "osp.json").read_text("utf-8"))
    assert osp["training"] == json.loads(json.dumps(report))
    assert osp["tokenizer_sha256"] == hashlib.sha256((directory / "final" / "tokenizer.json").read_bytes()).hexdigest()


def test_a_resumed_run_ends_where_an_unbroken_one_does(finished, corpus, tmp_path):
    directory, _ = finished
    streams = prepare([corpus], tmp_path / "data", TINY)
    first = Trainer.start(TINY, tmp_path, streams)
    for _ in range(10):
        first.train_step()
    first.save()
    report = train([corpus], tmp_path, TINY, resume=True, dtype=torch.float32, quiet=True)
    assert report["steps"] == 24
    whole, broken = (torch.load(checkpoints(d)[-1], weights_only=True)["model"] for d in (directory, tmp_path))
    for name in whole:
        assert torch.equal(whole[name], broken[name]), name


def test_an_export_that_would_change_the_logits_is_refused(monkeypatch):
    model = OSPModel(TINY.model, "osp")
    assert export.assert_unchanged(model) < 1e-12
    correct = export.folded

    def wrong(model):
        plain = correct(model)
        with torch.no_grad():
            plain.lm_head.weight[3, 5] += 1e-3
        return plain

    monkeypatch.setattr(export, "folded", wrong)
    with pytest.raises(export.ExportError, match="changed the logits"):
        export.assert_unchanged(model)


def test_gradients_add_up_over_micro_batches(corpus, tmp_path):
    streams = prepare([corpus], tmp_path / "data", TINY)
    whole, parts = (
        Trainer.start(replace(TINY, micro_batch_tokens=tokens), tmp_path, streams) for tokens in (1024, 192)
    )
    assert whole.train_step() == pytest.approx(parts.train_step(), rel=1e-5)
    # Adam's first step is the gradient's sign, which rounding may turn; Muon's is smooth.
    for one, other in zip(whole.model.layers.parameters(), parts.model.layers.parameters(), strict=True):
        if one.ndim == 2:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_lower_learning_rate_may_be_taken_up_on_resuming(corpus, tmp_path):
    streams = prepare([corpus], tmp_path / "data", TINY)
    first = Trainer.start(TINY, tmp_path, streams)
    first.train_step()
    first.save()
    second = Trainer.start(replace(TINY, matrix_lr=1e-4), tmp_path, streams)
    second.restore(checkpoints(tmp_path)[-1])
    assert [group["base_lr"] for o in second.optimizers for group in o.param_groups] == [1e-4, 4e-3, 4e-3]
    with pytest.raises(ConfigError, match="seed: 0 then, 9 now"):
        Trainer.start(replace(TINY, seed=9), tmp_path, streams).restore(checkpoints(tmp_path)[-1])


def test_a_refused_resume_leaves_the_record_alone(finished, corpus):
    directory, _ = finished
    before = (directory / "config.json").read_text("utf-8")
    with pytest.raises(ConfigError, match=r"steps: 24 then, 7 now"):
        train([corpus], directory, preset("tiny", steps=7), resume=True)
    assert (directory / "config.json").read_text("utf-8") == before


def test_a_run_is_not_started_over_another_nor_resumed_from_nothing(finished, corpus, tmp_path):
    directory, _ = finished
    with pytest.raises(ConfigError, match="--resume"):
        train([corpus], directory, TINY)
    with pytest.raises(ConfigError, match=r"steps: 24 then, 25 now"):
        train([corpus], directory, preset("tiny", steps=25), resume=True)
    with pytest.raises(ConfigError, match="no checkpoint"):
        train([corpus], tmp_path, TINY, resume=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "no such file"),
        (lambda folder: folder, "file in this directory"),
        (lambda folder: _write(folder / "a.txt", "just one"), "at least 2"),
    ],
)
def test_the_command_names_what_is_wrong_with_a_corpus(tmp_path, make, message):
    (tmp_path / "corpus").mkdir()
    arguments = ["--preset", "tiny", "--data", str(make(tmp_path / "corpus")), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(train_command, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**70)], "--seed"),
        (["--batch-tokens", "100"], "batch_tokens 100 is not a multiple of the context length 64"),
        (["--num-heads", "3"], "hidden_size 64 over 3 heads"),
        (["--matrix-lr", "nan"], "matrix_lr must be a positive number"),
        (["--matrix-lr", "-1"], "matrix_lr must be a positive number"),
        (["--out", __file__], "File exists"),
        (["--resume"], "no checkpoint to resume from"),
        (["--tokenizer", "nowhere"], "tokenizer.json is missing"),
        (["--data", "hf:a:b:c:d@"], "not of the form hf:NAME"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_the_command_names_a_bad_argument(corpus, tmp_path, arguments, message):
    base = ["--preset", "tiny", "--data", str(corpus), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(train_command, base + arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in result.output


def test_a_gpu_that_is_not_there_is_refused_before_the_corpus_is_read(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--preset", "tiny", "--data", str(corpus), "--out", str(tmp_path / "out"), "--device", "cuda"]
    result = CliRunner().invoke(train_command, arguments)
    assert result.exit_code == 1
    assert "torch finds no GPU here; use --device cpu" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_says_where_it_trains_and_draws_the_outliers(corpus, tmp_path):
    base = ["--preset", "tiny", "--steps", "4", "--data", str(corpus), "--out", str(tmp_path), "--device", "cpu"]
    batch = ["--batch-tokens", "512", "--micro-batch-tokens", "128"]
    result = CliRunner().invoke(train_command, [*base, *batch, "--activation-checkpointing", "--tensorboard"])
    assert result.exit_code == 0, result.output
    assert "training on cpu, products in float32" in result.stderr
    assert imread(tmp_path / "outliers.png").ndim == 3
    assert list((tmp_path / "tensorboard").iterdir())
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert (settings["device"], settings["activation_checkpointing"], settings["compile"]) == ("cpu", True, False)
    assert (settings["batch_tokens"], settings["micro_batch_tokens"]) == (512, 128)


def test_without_matplotlib_a_note_says_what_is_left_out(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails as if it were not installed
    base = ["--preset", "tiny", "--steps", "2", "--data", str(corpus), "--out", str(tmp_path)]
    result = CliRunner().invoke(train_command, base)
    assert result.exit_code == 0, result.output
    assert "the plot needs matplotlib: pip install 'osp-runtime[plot]'" in result.stderr
    assert not (tmp_path / "outliers.png").exists()
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_without_tensorboard_it_is_refused_before_the_corpus_is_read(corpus, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    base = ["--preset", "tiny", "--data", str(corpus), "--out", str(tmp_path / "out"), "--tensorboard"]
    result = CliRunner().invoke(train_command, base)
    assert result.exit_code == 1
    assert "needs the package tensorboard, which is missing: pip install 'osp-runtime[tensorboard]'" in result.output
    assert not (tmp_path / "out").exists()


def _write(path, text):
    path.write_text(text, "utf-8")
    return path
