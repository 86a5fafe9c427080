"""An ablation: six recipes that differ in nothing else, measured as transformers and numpy measure them, resumed as if
nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import ablation
from trainer.ablation import CURVE_POINTS, FORMS, Ablation
from trainer.ablation_cli import ablate
from trainer.config import RECIPES, ConfigError, preset
from trainer.data_sources import DataError
from trainer.loop import Trainer
from trainer.train import train

STEPS = 20
TINY = preset("tiny", steps=STEPS)
THREADS = 1


@pytest.fixture(scope="module")
def corpus(licence_corpus, tmp_path_factory):
    """A third of the licence: what is too little to learn from is quick to calibrate on."""
    file = tmp_path_factory.mktemp("corpus") / "licence.jsonl"
    file.write_text("".join(licence_corpus.read_text("utf-8").splitlines(keepends=True)[:16]), "utf-8")
    return file


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The directory of an ablation that nothing broke, and what its command printed."""
    torch.set_num_threads(THREADS)
    out = tmp_path_factory.mktemp("whole") / "ablation"
    result = CliRunner().invoke(ablate, arguments(corpus, out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def arguments(corpus, out, *options):
    return ["--preset", "tiny", "--steps", str(STEPS), "--data", str(corpus), "--out", str(out), "--json", *options]


def test_all_recipes_in_the_table_the_json_and_the_plot(whole):
    out, printed = whole
    result = json.loads(printed)
    assert result == json.loads((out / "ablation.json").read_text("utf-8"))
    assert list(result["recipes"]) == list(RECIPES)
    rows = [line for line in (out / "ablation.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(RECIPES)
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for measured in result["recipes"].values():
        assert [step for step, _ in measured["curve"]] == [10, 20]
        assert set(measured["ratio"]) == set(FORMS)


def test_a_recipe_is_what_train_makes_of_it_alone(whole, corpus, tmp_path):
    out, _ = whole
    alone = preset("tiny", steps=STEPS, recipe="muon+embproj", eval_every=STEPS)
    report = train([corpus], tmp_path / "alone", alone, quiet=True)
    name = "final/model.safetensors"
    assert (out / "muon+embproj" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    measured = json.loads((out / "ablation.json").read_text("utf-8"))["recipes"]["muon+embproj"]
    assert measured["held_out_loss"] == report["held_out_loss"]
    assert measured["excess_kurtosis"]["in_context"] == report["excess_kurtosis"]


def test_perplexity_and_kurtosis_are_those_of_transformers(whole):
    out, printed = whole
    measured = json.loads(printed)["recipes"]["osp"]
    model = AutoModelForCausalLM.from_pretrained(out / "osp" / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "osp" / "final")
    lines = (out / "data" / "held_out.jsonl").read_text("utf-8").splitlines()
    documents = [tokenizer(json.loads(line)["text"]).input_ids for line in lines]

    losses, length = [], TINY.model.context_length
    for ids in documents:
        for start in range(0, len(ids), length):
            window = torch.tensor(ids[start : start + length])
            logits = model(window[None]).logits[0, :-1].double()
            losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert measured["perplexity"]["16-bit"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)

    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    held_out = np.fromfile(out / "data" / "held_out-00000.bin", np.uint16).astype(np.int64)
    windows = (len(held_out) - 1) // length
    with torch.no_grad():
        model(torch.from_numpy(held_out[: windows * length, None]))
    blocks = [hidden.squeeze(1).double().numpy() for hidden in outputs]
    by_block = [np.maximum(np.mean(x_ND**4, 1) / np.std(x_ND, 1) ** 4 - 3, 0).mean() for x_ND in blocks]
    # The export is in bfloat16, and what was measured is not.
    assert measured["excess_kurtosis"]["single_tokens"] == pytest.approx(np.mean(by_block), rel=0.05)


def test_the_curve_has_so_many_points_and_as_many_checkpoints(tmp_path):
    config = Ablation([], tmp_path, preset("demo", steps=1000)).config
    assert config.eval_every == config.checkpoint_every == 1000 // CURVE_POINTS
    config = Ablation([], tmp_path, preset("demo", steps=100_000)).config
    assert (config.eval_every, config.checkpoint_every) == (200, 500)  # as the preset has it


@pytest.fixture
def killed_ablation(corpus, tmp_path):
    """The directory of an `osp ablate` that was killed in the middle of its second quantization."""
    out = tmp_path / "broken"
    command = [sys.executable, "-c", "from trainer.ablation_cli import ablate; ablate()"]
    command += arguments(corpus, out, "--threads", str(THREADS))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "adam" / ".w4a4-ffn.partial").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    return out


@pytest.fixture
def stop_signal(monkeypatch):
    """Sends this process SIGTERM in the middle of the training of "muon-only"."""
    step = Trainer.train_step

    def step_and_signal(trainer):
        loss = step(trainer)
        if trainer.config.recipe == "muon-only" and trainer.step == STEPS - 5:
            signal.raise_signal(signal.SIGTERM)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", step_and_signal)
        yield patched


def times_of_change(*files):
    return [file.stat().st_mtime_ns for file in files]


def test_killed_stopped_and_resumed_equals_unbroken(whole, killed_ablation, corpus, stop_signal, monkeypatch):
    out = killed_ablation
    finished = [out / "adam" / "final" / "model.safetensors", out / "adam" / "w4a4" / "osp.safetensors"]
    finished_at = times_of_change(*finished)

    stopped = CliRunner().invoke(ablate, arguments(corpus, out))
    assert stopped.exit_code == 0, stopped.output
    assert json.loads(stopped.stdout) == {"stopped_at_step": STEPS - 5}
    assert list(json.loads((out / "ablation.json").read_text("utf-8"))["recipes"]) == ["adam"]
    table = (out / "ablation.md").read_text("utf-8")
    assert "| Adam |" in table
    assert "| Muon" not in table

    stop_signal.undo()
    monkeypatch.setattr(ablation, "RECIPES", ["adam", "muon-only"])  # the others would show nothing more
    result = Ablation([str(corpus)], out, TINY).run(quiet=True)["recipes"]
    assert times_of_change(*finished) == finished_at
    unbroken = json.loads(whole[1])["recipes"]
    assert result == {name: unbroken[name] for name in ("adam", "muon-only")}


def test_other_settings_are_refused_by_name(whole, corpus, tmp_path):
    out, _ = whole
    with pytest.raises(ConfigError, match=r"steps: 20 then, 30 now"):
        Ablation([str(corpus)], out, preset("tiny", steps=30))
    with pytest.raises(ConfigError, match=r"vocab_size: 512 then, 4096 now; hidden_size: 64 then, 256 now"):
        Ablation([str(corpus)], out, preset("demo", steps=STEPS))
    other = tmp_path / "other.txt"
    other.write_text("Another text.", "utf-8")
    with pytest.raises(DataError, match="another text"):
        Ablation([str(other)], out, TINY).run(quiet=True)


def test_the_command_takes_shape_batch_and_learning_rates(whole, corpus):
    out, _ = whole
    changes = ["--num-layers", "1", "--batch-tokens", "512", "--matrix-lr", "0.001"]
    result = CliRunner().invoke(ablate, arguments(corpus, out, *changes))
    assert result.exit_code == 1
    for change in ("num_layers: 2 then, 1 now", "batch_tokens: 1024 then, 512 now", "matrix_lr: 0.004 then, 0.001 now"):
        assert change in result.stderr


def test_errors_are_one_clear_line(corpus, tmp_path):
    missing = CliRunner().invoke(ablate, arguments(tmp_path / "nothing.txt", tmp_path / "out"))
    assert missing.exit_code == 1
    assert "nothing.txt: no such file" in missing.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "ablation.json").write_text('{"settings"', "utf-8")
    result = CliRunner().invoke(ablate, arguments(corpus, damaged))
    assert result.exit_code == 1
    assert f"{damaged / 'ablation.json'} is damaged" in result.stderr
    assert os.listdir(damaged) == ["ablation.json"]


def test_torchrun_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(ablate, arguments(corpus, tmp_path / "out"))
    assert result.exit_code == 1
    assert "torchrun shares a single run, of osp train" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_table_is_there_and_a_note_says_what_is_not(whole, corpus, monkeypatch):
    out, printed = whole
    (out / "ablation.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(ablate, arguments(corpus, out))
    assert result.exit_code == 0
    assert result.stdout == printed
    assert "note: the plot needs matplotlib: pip install 'osp-runtime[plot]'" in result.stderr
    assert not (out / "ablation.png").exists()
