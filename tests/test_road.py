"""The whole road on a corpus of one's own: train, quantize, look, evaluate, serve, ask. Under a minute on one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import openai
import pytest
from server_process import running_server


def osp(*arguments: str) -> dict[str, object]:
    """Runs a command as a user does, and reads the one object that it prints."""
    command = [sys.executable, "-m", "runtime.cli", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a trained model, its 4-bit form and nothing else that the tests below would need."""
    folder = tmp_path_factory.mktemp("road")
    corpus = folder / "corpus"
    corpus.mkdir()
    for name, text in topics.items():
        (corpus / f"{name.replace('/', '-')}.txt").write_text(text, "utf-8")
    run = folder / "run"
    trained = osp("train", "--preset", "tiny", "--steps", "60", "--data", str(corpus), "--out", str(run))
    assert trained["checkpoint"] == str(run / "final")
    texts = ["--calibration", str(run / "data" / "calibration.jsonl"), "--eval", str(run / "data" / "held_out.jsonl")]
    osp("quantize", str(run / "final"), "--out", str(run / "w4a4"), *texts)
    options = ["--scheme", "w4a4-token", "--kv", "4", "--hadamard", "full", "--head", "8", "--embedding", "8"]
    osp("quantize", str(run / "final"), "--out", str(run / "rotated"), *texts, *options, "--weights", "gptq")
    return run


def test_what_was_trained_survives_four_bits(road: Path) -> None:
    quality = json.loads((road / "w4a4" / "osp.json").read_text("utf-8"))["quality"]
    # 512 tokens at random are a perplexity of 512.
    assert quality["perplexity_16bit"] < 250
    assert 0.9 < quality["ratio"] < 1.2


def test_info_tells_the_two_forms_apart(road: Path) -> None:
    full, small = osp("info", str(road / "final")), osp("info", str(road / "w4a4"))
    assert (full["scheme"], small["scheme"]) == ("bfloat16", "w4a4")
    assert full["body_bits_per_weight"] == 16
    assert 4 < float(str(small["body_bits_per_weight"])) < 4.05


@pytest.mark.parametrize(
    ("form", "recorded"), [("final", "perplexity_16bit"), ("w4a4", "perplexity"), ("rotated", "perplexity")]
)
@pytest.mark.parametrize(("engine", "within"), [("reference", 1e-3), ("native", 1e-2)])
def test_the_engine_measures_the_perplexity_that_torch_did(
    road: Path, form: str, recorded: str, engine: str, within: float
) -> None:
    """The native engine holds keys and values of 16 bits in bfloat16; what that rounds, 4-bit codes make larger."""
    data = str(road / "data" / "held_out.jsonl")
    measured = osp("eval", str(road / form), "--data", data, "--engine", engine)
    of = "w4a4" if form == "final" else form
    quality = json.loads((road / of / "osp.json").read_text("utf-8"))["quality"]
    assert measured["tokens"] == quality["tokens"]
    assert measured["perplexity"] == pytest.approx(quality[recorded], rel=within)


def test_the_four_bit_model_answers_over_http(road: Path) -> None:
    with running_server(str(road / "w4a4")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.completions.create(model="w4a4", prompt="The statement", max_tokens=24, seed=1)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 24
        # Even 60 steps teach that words have blanks between them.
        assert len(answer.choices[0].text.split()) > 3
        assert server.stop() == 0
