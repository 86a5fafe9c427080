"""`osp quantize`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from quant import convert
from quant.cli import quantize
from quant.format import read_checkpoint


@pytest.fixture
def run():
    """`run(*arguments)` calls the command; a traceback fails the test."""

    def call(*arguments):
        result = CliRunner().invoke(quantize, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def refused(result, *words):
    """One clear sentence, exit status 1, and nothing on stdout."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert all(str(word) in result.stderr for word in words), result.stderr


def test_json_is_one_object_and_nothing_else(checkpoint_path, text_path, tmp_path):
    command = [sys.executable, "-c", "from quant.cli import quantize; quantize()", checkpoint_path]
    command += ["--out", tmp_path / "out", "--calibration", text_path, "--json"]
    screen, terminal = os.openpty()  # a terminal for stderr, where progress bars would show
    termios.tcsetwinsize(terminal, (24, 80))
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.write(terminal, b"end")
    assert os.read(screen, 4096) == b"end"
    os.close(screen)
    os.close(terminal)
    assert json.loads(done.stdout) == {"out": str(tmp_path / "out"), **read_checkpoint(tmp_path / "out").provenance}


def test_the_table_has_a_line_for_every_layer(checkpoint_path, tmp_path, run):
    result = run(checkpoint_path, "--out", tmp_path / "out")
    assert result.exit_code == 0
    for name in read_checkpoint(tmp_path / "out").linears:
        assert sum(line.startswith(f"{name} ") for line in result.stdout.splitlines()) == 1
    assert "(bundled)" in result.stdout
    assert "(held back from calibration)" in result.stdout


def test_the_command_names_what_is_wrong(checkpoint_path, text_path, tmp_path, run):
    out = tmp_path / "out"
    refused(run(tmp_path / "nowhere", "--out", out), "nowhere: no such directory")
    refused(run(checkpoint_path, "--out", out, "--scheme", "w1"), "unknown scheme 'w1'", "w4a4")
    refused(run(checkpoint_path, "--out", out, "--calibration", tmp_path / "no.txt"), "no.txt: no such file")
    refused(run(checkpoint_path, "--out", out, "--eval", tmp_path / "no.txt"), "no.txt: no such file")
    refused(run(checkpoint_path, "--out", checkpoint_path), "exists and is not an empty directory")
    assert not out.exists()

    run(checkpoint_path, "--out", out, "--calibration", text_path)
    refused(run(out, "--out", tmp_path / "again"), "is quantized already (w4a4)")

    file = checkpoint_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, file)
    refused(run(checkpoint_path, "--out", tmp_path / "nan"), "model.layers.0.mlp.up_proj.weight", "NaN")

    file.write_bytes(file.read_bytes()[:100])
    refused(run(checkpoint_path, "--out", tmp_path / "nan"), "truncated")


def test_activations_that_overflow_are_named(checkpoint_path, text_path, tmp_path, run):
    file = checkpoint_path / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"][:] = 1e38
    save_file(tensors, file, metadata={"format": "pt"})
    result = run(checkpoint_path, "--out", tmp_path / "out", "--calibration", text_path)
    refused(result, "input of model.layers.1.mlp.down_proj", "NaN or infinite")


def test_the_command_loads_without_torch_and_says_how_to_get_it(checkpoint_path, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from quant.cli import quantize\n"
        "assert 'transformers' not in sys.modules\n"
        "from runtime.cli import main\n"
        "main(['quantize', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, str(checkpoint_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: this command needs torch")
    assert "pip install 'osp-runtime[quant]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_survive_is_called_so(checkpoint_path, text_path, tmp_path, monkeypatch, run):
    arguments = (checkpoint_path, "--calibration", text_path, "--json", "--out")
    result = run(*arguments, tmp_path / "sound")
    sound = json.loads(result.stdout)
    assert sound["quality"]["ratio"] < convert.OUTLIER_SAFE_RATIO
    assert sound["warning"] is None
    assert "WARNING" not in result.stderr

    monkeypatch.setattr(convert, "OUTLIER_SAFE_RATIO", sound["quality"]["ratio"] * 0.99)
    result = run(*arguments, tmp_path / "broken")
    assert result.exit_code == 0
    assert "not outlier-safe" in json.loads(result.stdout)["warning"]
    assert result.stderr.startswith("WARNING: this model is not outlier-safe")


@pytest.fixture
def idle(monkeypatch):
    """Fails the test if the pipeline as much as reads its source."""

    def fail(*_arguments):
        raise AssertionError("worked before it knew that nothing can be written")

    monkeypatch.setattr(convert, "read_checkpoint", fail)


def test_an_out_below_a_file_costs_no_work(checkpoint_path, text_path, run, idle):
    for out in (text_path / "out", text_path / "sub" / "out"):
        refused(run(checkpoint_path, "--out", out), f"{out} cannot be made")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_out_where_nothing_may_be_written_costs_no_work(checkpoint_path, tmp_path, run, idle):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(run(checkpoint_path, "--out", tmp_path / "locked" / "out"), "cannot be made", "Permission denied")
