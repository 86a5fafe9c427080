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
from quant.format import read_checkpoint, write_json
from quant.layers import LayerQuantizer
from quant.scheme import named


@pytest.fixture
def run():
    """`run(*arguments)` calls the command; a traceback fails the test."""

    def call(*arguments):
        result = CliRunner().invoke(quantize, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def path(make_checkpoint):
    return make_checkpoint(intermediate_size=40)


def refused(result, *words):
    """One clear sentence, exit status 1, and nothing on stdout."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert all(str(word) in result.stderr for word in words), result.stderr


def test_json_is_one_object_and_nothing_else(path, text_path, tmp_path):
    command = [sys.executable, "-c", "from quant.cli import quantize; quantize()", path, "--weights", "gptq"]
    command += ["--out", tmp_path / "out", "--calibration", text_path, "--json"]
    screen, terminal = os.openpty()  # a terminal for stderr, where progress bars would show
    termios.tcsetwinsize(terminal, (24, 80))
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.write(terminal, b"end")
    assert os.read(screen, 4096) == b"end"
    os.close(screen)
    os.close(terminal)
    assert json.loads(done.stdout) == {"out": str(tmp_path / "out"), **read_checkpoint(tmp_path / "out").provenance}


def test_bars_are_drawn_on_a_terminal(path, text_path, tmp_path):
    command = [sys.executable, "-c", "from quant.cli import quantize; quantize()", path, "--weights", "gptq"]
    command += ["--out", tmp_path / "out", "--calibration", text_path]
    screen, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=terminal, check=True)
    os.write(terminal, b"end")
    drawn = b""
    while not drawn.endswith(b"end"):
        drawn += os.read(screen, 65_536)
    os.close(screen)
    os.close(terminal)
    for bar in (b"calibrating:", b"GPTQ in layer 1:", b"perplexity before:", b"perplexity after:"):
        assert bar in drawn


def test_the_table_has_a_line_for_every_site(path, tmp_path, run):
    result = run(path, "--out", tmp_path / "out", "--hadamard", "ffn", "--embedding", 8)
    assert result.exit_code == 0
    written = read_checkpoint(tmp_path / "out")
    for name in (*written.linears, "model.embed_tokens"):
        assert sum(line.startswith(f"{name} ") for line in result.stdout.splitlines()) == 1
    assert "(bundled)" in result.stdout
    assert "(held back from calibration)" in result.stdout
    quality = written.provenance["quality"]
    assert f"perplexity {quality['perplexity_16bit']:.4g} -> {quality['perplexity']:.4g} (x " in result.stdout
    assert f"body {sum(linear.nbytes for linear in written.linears.values()):,}, head 12,480" in result.stdout


def test_a_text_that_was_cut_is_said_to_be(path, text_path, tmp_path, run):
    arguments = (path, "--calibration", text_path, "--eval", text_path)
    cut = run(*arguments, "--out", tmp_path / "cut", "--calibration-tokens", 100)
    assert "calibrated on 100 tokens (text.txt; --calibration-tokens has cut the text)" in cut.stdout
    whole = run(*arguments, "--out", tmp_path / "whole")
    assert "calibrated on 360 tokens (text.txt)" in whole.stdout


def test_options_change_the_scheme(path, text_path, tmp_path, run):
    options = ("--scheme", "w4a8", "--kv", 4, "--head", 8, "--embedding", 4, "--hadamard", "full", "--clip", "99.9")
    result = run(path, "--out", tmp_path / "out", "--eval", text_path, *options, "--weights", "gptq", "--json")
    wanted = named("w4a8").changed(kv_bits=4, head=8, embedding_bits=4, hadamard="full")
    assert read_checkpoint(tmp_path / "out").scheme == wanted
    quantization = json.loads(result.stdout)["quantization"]
    assert (quantization["weights"], quantization["clip"]) == ("gptq", "99.9")


def test_a_scheme_comes_from_a_file_and_options_go_before_it(path, text_path, tmp_path, run):
    file = tmp_path / "mine.yaml"
    file.write_text("scheme: w4a4\nkv_bits: 4\nhadamard: ffn\ndown: {weight_bits: 8, activation_bits: 8}\n")
    run(path, "--out", tmp_path / "out", "--calibration", text_path, "--scheme", file, "--kv", 8)
    down = {"weight_bits": 8, "activation_bits": 8}
    assert read_checkpoint(tmp_path / "out").scheme == named("w4a4").changed(kv_bits=8, hadamard="ffn", down=down)
    file.write_text("scheme: w4a4\nkv: 4\n")
    refused(run(path, "--out", tmp_path / "no", "--scheme", file), "mine.yaml: unknown setting 'kv'")
    refused(run(path, "--out", tmp_path / "no", "--scheme", tmp_path / "no.yml"), "no.yml: cannot be read")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--clip", "p1"),
        ("--clip", "huge"),
        ("--clip", "101"),
        ("--kv", "3"),
        ("--max-ratio", "nan"),
        ("--max-ratio", "-1"),
    ],
)
def test_a_value_that_makes_no_sense_is_a_usage_error(path, tmp_path, run, option, value):
    result = run(path, "--out", tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_names_what_is_wrong(path, text_path, tmp_path, run):
    out = tmp_path / "out"
    refused(run(tmp_path / "nowhere", "--out", out), "nowhere: no such directory")
    refused(run(path, "--out", out, "--scheme", "w1"), "unknown scheme 'w1'", "w4a4")
    refused(
        run(path, "--out", out, "--scheme", "w4a16", "--embedding", 4, "--calibration", tmp_path / "no.txt"), "no.txt"
    )
    refused(run(path, "--out", out, "--calibration", tmp_path / "no.txt"), "no.txt: no such file")
    unneeded = ("--scheme", "w4a16", "--eval", text_path, "--calibration", tmp_path / "no.txt")
    refused(run(path, "--out", out, *unneeded), "no.txt: no such file")
    refused(run(path, "--out", out, "--eval", tmp_path / "no.txt"), "no.txt: no such file")
    refused(run(path, "--out", path), "exists and is not an empty directory")
    assert not out.exists()

    run(path, "--out", out, "--calibration", text_path)
    refused(run(out, "--out", tmp_path / "again"), "is quantized already (w4a4)")

    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, file)
    refused(run(path, "--out", tmp_path / "nan"), "model.layers.0.mlp.up_proj.weight", "NaN")

    file.write_bytes(file.read_bytes()[:100])
    refused(run(path, "--out", tmp_path / "nan"), "truncated")


def test_a_percentile_of_dead_channels_is_refused(path, text_path, tmp_path, run):
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][2:] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = (path, "--out", tmp_path / "out", "--calibration", text_path, "--clip")
    refused(run(*arguments, 90), "input of model.layers.0.mlp.down_proj: 90 % of the values are zero", "--clip mse")
    assert run(*arguments, 99).exit_code == 0


def test_activations_that_overflow_are_named_and_what_is_done_is_kept(path, text_path, tmp_path, run):
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"][:] = 1e38
    save_file(tensors, file, metadata={"format": "pt"})
    result = run(path, "--out", tmp_path / "out", "--calibration", text_path)
    refused(
        result,
        "input of model.layers.1.mlp.down_proj",
        "NaN or infinite",
        "the finished parts (1) are kept in",
        "--resume",
    )


def test_ctrl_c_says_how_to_go_on(path, text_path, tmp_path, run, monkeypatch):
    layer, arguments = LayerQuantizer.layer, (path, "--out", tmp_path / "out", "--calibration", text_path)

    def interrupted(self, index, seen):
        if index == 1:
            raise KeyboardInterrupt
        return layer(self, index, seen)

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "layer", interrupted)
        result = run(*arguments)
    assert result.exit_code == 1
    assert f"the finished parts (1) are kept in {tmp_path / '.out.partial'}; go on with --resume" in result.stderr
    refused(run(*arguments), "holds an unfinished run; go on with --resume, or remove the directory")
    refused(run(*arguments, "--resume", "--kv", 4), "parts of a run that differs in: scheme;")
    assert run(*arguments, "--resume").exit_code == 0


def test_the_command_loads_without_torch_and_says_how_to_get_it(path, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from quant.cli import quantize\n"
        "assert 'transformers' not in sys.modules\n"
        "from runtime.cli import main\n"
        "main(['quantize', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: this command needs torch")
    assert "pip install 'osp-runtime[quant]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_survive_is_called_so(path, text_path, tmp_path, run):
    arguments = (path, "--calibration", text_path, "--json", "--out")
    result = run(*arguments, tmp_path / "sound")
    sound = json.loads(result.stdout)
    assert sound["quality"]["ratio"] < 1.5
    assert sound["warning"] is None
    assert result.stderr == ""

    limit = sound["quality"]["ratio"] * 0.99
    result = run(*arguments, tmp_path / "broken", "--max-ratio", limit)
    assert result.exit_code == 0
    warning = json.loads(result.stdout)["warning"]
    assert result.stderr == f"WARNING: {warning}\n"
    assert "not outlier-safe: w4a4 takes its perplexity from" in warning
    assert "try --hadamard ffn" in warning
    assert read_checkpoint(tmp_path / "broken").provenance["warning"] == warning

    result = run(*arguments, tmp_path / "strict", "--max-ratio", limit, "--strict")
    refused(result, "not outlier-safe", f"x {sound['quality']['ratio']:.4g}")
    assert not (tmp_path / "strict").exists()
    result = run(*arguments, tmp_path / "strict", "--max-ratio", limit, "--resume")  # to have it all the same
    assert json.loads(result.stdout)["quality"] == sound["quality"]


def test_a_perplexity_that_is_not_finite_loses_no_work(path, text_path, tmp_path, run, monkeypatch):
    def not_finite(source, *arguments, **settings):
        if source.scheme is not None:
            raise convert.NonFiniteError("nan")
        return measure(source, *arguments, **settings)

    measure = convert.measure_perplexity
    monkeypatch.setattr(convert, "measure_perplexity", not_finite)
    arguments = (path, "--calibration", text_path, "--out")
    result = run(*arguments, tmp_path / "out")
    assert result.exit_code == 0
    assert " -> not finite on " in result.stdout
    assert "WARNING: this model is not outlier-safe" in result.stderr
    provenance = read_checkpoint(tmp_path / "out").provenance
    assert (provenance["quality"]["perplexity"], provenance["quality"]["ratio"]) == (None, None)
    refused(run(*arguments, tmp_path / "strict", "--strict"), "no finite number")


def test_notes_go_to_stderr(path, text_path, tmp_path, run):
    write_json(path / "osp.json", {"tuning": {"scheme": named("w4a8").to_dict()}})
    save_file({"x": np.ones(1, np.float32)}, path / "scales.safetensors")
    result = run(path, "--calibration", text_path, "--out", tmp_path / "out", "--json")
    assert result.stderr.startswith("note: scales.safetensors is for another scheme (w4a8; ")
    json.loads(result.stdout)


@pytest.fixture
def idle(monkeypatch):
    """Fails the test if the pipeline as much as reads its source."""

    def fail(*_arguments):
        raise AssertionError("worked before it knew that nothing can be written")

    monkeypatch.setattr(convert, "CheckpointReader", fail)


def test_an_out_below_a_file_costs_no_work(path, text_path, run, idle):
    for out in (text_path / "out", text_path / "sub" / "out"):
        refused(run(path, "--out", out), f"{out} cannot be made")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_out_where_nothing_may_be_written_costs_no_work(path, tmp_path, run, idle):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(run(path, "--out", tmp_path / "locked" / "out"), "cannot be made", "Permission denied")
