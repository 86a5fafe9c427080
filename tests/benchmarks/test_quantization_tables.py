"""Rows, what is kept of them, and the tables. Most tests put a copy of the model in the place of a quantized one."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_full_precision
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from benchmarks import ledger as ledger_module
from benchmarks.bench import Bench, fingerprint
from benchmarks.ledger import Ledger
from benchmarks.markdown import perplexity_cell, task_cell
from benchmarks.quantization import main, write_tables
from benchmarks.rows import TASK_ROWS, tables
from quant.convert import quantize_checkpoint
from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.scheme import LINEAR_SITES, LinearScheme, named

TIMES = "\N{MULTIPLICATION SIGN}"

WORDS = 32
"""In a document of the texts: few, as each test measures many rows."""


class CopyingQuantizer:
    """In the place of `quantize_checkpoint`: copies the model, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.head_factor = 1.0

    def __call__(self, source: Path, out: Path, scheme: Any, **settings: Any) -> None:
        self.calls.append({"scheme": scheme, **settings})
        shutil.copytree(source, out)
        weights = load_file(out / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(self.head_factor)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def words(file: Path, seed: int) -> Path:
    ids = np.random.default_rng(seed).integers(0, 97, (2, WORDS))
    file.write_text("".join(json.dumps({"text": " ".join(f"t{i}" for i in row)}) + "\n" for row in ids))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_full_precision(tmp_path / "model")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """For calibration and for evaluation."""
    return words(tmp_path / "calibration.jsonl", 0), words(tmp_path / "eval.jsonl", 1)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "quiz.jsonl"
    questions = [{"context": f"t{i} t2", "choices": [" t3", " t4 t5"], "label": i % 2} for i in range(3)]
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return file


@pytest.fixture
def quantizer() -> CopyingQuantizer:
    return CopyingQuantizer()


def bench_of(model: Path, texts: tuple[Path, Path], quantize: Any, out: Path) -> Bench:
    return Bench(model, *texts, Ledger(out.with_suffix(".jsonl")), quantize)


@pytest.mark.parametrize("tied", [False, True])
def test_every_row_makes_sense_and_has_a_name_of_its_own(model: Path, tied: bool) -> None:
    config = replace(CheckpointReader(model).config, tie_word_embeddings=tied)
    rows = [row for table in tables(config) for row in table.rows()]
    for row in rows:
        config.check_scheme(row.scheme)
    assert len({row.name for row in rows}) == len({(row.scheme, row.weights) for row in rows})
    assert set(TASK_ROWS) <= {row.name for row in rows}
    for table in tables(config):
        assert all(len(line) == len(table.columns) - 1 for line in table.lines.values())


def test_a_site_alone_is_the_only_one_that_is_quantized(model: Path) -> None:
    *_, table = tables(CheckpointReader(model).config)
    for label in (*LINEAR_SITES, "head", "embedding", "KV cache"):
        row = table.lines[label][0]
        assert row is not None
        scheme = row.scheme
        quantized = {site for site in (*LINEAR_SITES, "head") if getattr(scheme, site) != LinearScheme()}
        quantized |= {"embedding"} if scheme.embedding_bits < 16 else set()
        quantized |= {"KV cache"} if scheme.kv_bits < 16 else set()
        assert quantized == {label}
        if label in LINEAR_SITES:
            assert getattr(scheme, label) == getattr(named("w4a4"), label)


def test_all_rows_are_measured_once(
    model: Path, texts: tuple[Path, Path], quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "tables.md"
    write_tables(bench_of(model, texts, quantizer, out), out, command="the command")
    rows = {row.name: row for table in tables(CheckpointReader(model).config) for row in table.rows()}
    asked = [(call["scheme"], call["weights"]) for call in quantizer.calls]
    assert asked == [(row.scheme, row.weights) for row in rows.values()]
    assert all(call["calibration"] == [texts[0]] for call in quantizer.calls)
    text = out.read_text()
    assert text.startswith("```\nthe command\n```\n")
    assert "not measured" not in text
    # What was measured is a copy of the model.
    cells = [cell for table in tables(CheckpointReader(model).config) for cell in table.rows()]
    assert text.count(f"(1.000 {TIMES})") == len(cells)

    write_tables(bench_of(model, texts, quantizer, out), tmp_path / "again.md", command="the command")
    assert len(quantizer.calls) == len(rows)
    assert (tmp_path / "again.md").read_text() == text


def test_another_text_is_measured_anew(
    model: Path, texts: tuple[Path, Path], quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    out = tmp_path / "tables.md"
    for _ in range(2):
        write_tables(bench_of(model, texts, quantizer, out), out, command="", patterns=["w4a16"])
    assert len(quantizer.calls) == 1
    words(texts[1], seed=2)
    write_tables(bench_of(model, texts, quantizer, out), out, command="", patterns=["w4a16"])
    words(texts[0], seed=3)
    write_tables(bench_of(model, texts, quantizer, out), out, command="", patterns=["w4a16"])
    assert len(quantizer.calls) == 3


def test_a_model_that_changes_during_the_run_is_noticed(
    model: Path, texts: tuple[Path, Path], quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    def replace_model(*arguments: Any, **settings: Any) -> None:
        quantizer(*arguments, **settings)
        write_full_precision(model, seed=len(quantizer.calls))

    bench = bench_of(model, texts, replace_model, tmp_path / "tables.md")
    with pytest.raises(CheckpointError, match="changed during the run"):
        write_tables(bench, tmp_path / "tables.md", command="")
    assert len(quantizer.calls) == 1


def test_learned_scales_make_another_model(model: Path) -> None:
    before = fingerprint(model)
    save_file({"x.weight_scale": np.ones(1, np.float32)}, model / "scales.safetensors")
    (model / "osp.json").write_text('{"tuning": {"scheme": {}}}')
    assert fingerprint(model)[: len(before)] == before
    assert fingerprint(model) != before


def test_a_run_that_was_cut_off_goes_on(
    model: Path, texts: tuple[Path, Path], quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    def cut_off(*arguments: Any, **settings: Any) -> None:
        if len(quantizer.calls) == 2:
            raise KeyboardInterrupt
        quantizer(*arguments, **settings)

    out = tmp_path / "tables.md"
    with pytest.raises(KeyboardInterrupt):
        write_tables(bench_of(model, texts, cut_off, out), out, command="", patterns=["w4a4*"])
    assert not out.exists()
    write_tables(bench_of(model, texts, quantizer, out), out, command="", patterns=["w4a4*"])
    asked = [(call["scheme"], call["weights"]) for call in quantizer.calls]
    assert len(asked) == len(set(asked))


def test_a_row_is_what_the_quantizer_itself_reports(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "tables.md"
    write_tables(bench_of(model, texts, quantize_checkpoint, out), out, command="", patterns=["w4a4"])
    calibration, heldout = texts
    report = quantize_checkpoint(model, tmp_path / "w4a4", named("w4a4"), calibration=[calibration], heldout=[heldout])
    quality = report["quality"]
    assert (
        f"which is {quality['perplexity_16bit']:.2f}, on {quality['tokens']} tokens of `eval.jsonl`" in out.read_text()
    )
    assert f"| w4a4 | {quality['perplexity']:.2f} ({quality['ratio']:.3f} {TIMES}) |" in out.read_text()


def test_a_model_that_diverges_has_its_row(
    model: Path, texts: tuple[Path, Path], quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    quantizer.head_factor = 1e6
    out = tmp_path / "tables.md"
    write_tables(bench_of(model, texts, quantizer, out), out, command="", patterns=["w4a16"])
    assert "| w4a16 | diverges: not finite | not measured | not measured |" in out.read_text()


def test_figures_have_three_or_four_digits() -> None:
    assert perplexity_cell(38.056, 29.91) == f"38.06 (1.272 {TIMES})"
    assert perplexity_cell(1.93e13, 19.3) == f"1.9e13 (1.0e12 {TIMES})"
    assert perplexity_cell(float(np.exp(709.7)), 10.0) == f"1.7e308 (1.7e307 {TIMES})"
    assert task_cell({"accuracy": 0.42, "accuracy_stderr": 0.0496}, "accuracy") == "42.0 ± 5.0"
    assert task_cell({"accuracy": 1.0, "accuracy_stderr": None}, "accuracy") == "100.0"
    assert task_cell({"accuracy": None}, "accuracy") == "diverges: not finite"


def test_tasks_and_other_checkpoints(
    model: Path, texts: tuple[Path, Path], task: Path, quantizer: CopyingQuantizer, tmp_path: Path
) -> None:
    out, other = tmp_path / "tables.md", tmp_path / "other"
    quantize_checkpoint(model, other, named("w4a16").changed(kv_bits=8), heldout=[texts[1]])
    bench = bench_of(model, texts, quantizer, out)
    write_tables(bench, out, command="", patterns=["w4a16*"])
    write_tables(bench, out, command="", patterns=["w4a16*"], also={"tuned": other}, tasks=[task])
    text = out.read_text()
    assert "| tuned | w4a16-kv8 | " in text
    assert "questions: 3 of quiz." in text
    _, section = text.split("### Tasks")
    labels = [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("|")][2:]
    assert labels == ["16 bits", "tuned", "w4a16"]
    # Only what had no answers yet was quantized once more.
    assert [call["scheme"].hadamard for call in quantizer.calls] == ["none", "ffn", "full", "none"]


def test_measurements_by_older_code_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).keep("k", "w4a4 on x.jsonl", {"perplexity": 2.0})
    fresh = Ledger(path)
    assert fresh.find("k") == {"perplexity": 2.0}
    assert fresh.outdated == []
    monkeypatch.setattr(ledger_module, "_code_sha256", lambda: "another")
    old = Ledger(path)
    old.find("k")
    assert old.outdated == ["w4a4 on x.jsonl"]


def test_a_damaged_ledger_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).keep("k", "x", {"perplexity": 2.0})
    for line in ("{", "[]", '{"key": "k"}'):
        path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"ledger\.jsonl:2: not a measurement"):
            Ledger(path)


def test_the_command(model: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, heldout = map(str, texts)
    out = tmp_path / "tables.md"
    arguments = [str(model), "--calibration", calibration, "--eval", heldout, "--out", str(out), "--rows", "w4a8 ffn"]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *arguments])
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert out.read_text().splitlines()[1] == f"python -m benchmarks.quantization {' '.join(arguments[:-1])} 'w4a8 ffn'"

    for wrong, message in (
        ([*arguments[:-1], "w5*"], "no row is called w5*; there are: w4a16, "),
        ([*arguments, "--also", str(model)], "NAME=DIR is wanted"),
        ([*arguments, "--also", f"x={model}2"], "does not exist"),
        ([*arguments, "--also", f"x={tmp_path}"], "config.json is missing"),
    ):
        done = CliRunner().invoke(main, wrong)
        assert done.exit_code > 0
        assert message in done.output
