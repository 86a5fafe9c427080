"""The wheel in a clean virtual environment, with the base dependencies only: the demo model is served without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, running_server

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that `pip install osp-runtime` has made."""
    folder = tmp_path_factory.mktemp("install")
    # A copy: the build leaves files in its source tree, which the next build would pack again.
    for name in ("trainer", "quant", "runtime"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("osp_runtime-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "--quiet", "install", str(wheel)], check=True)
    return python


@pytest.fixture(scope="module")
def server(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`osp serve` with no argument, from a directory where no source tree can help it."""
    with running_server(python=python, cwd=tmp_path_factory.mktemp("elsewhere")) as running:
        yield running
        assert running.stop() == 0


def test_torch_is_not_there(python: Path) -> None:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "osp-runtime" in names
    assert not names & {"torch", "transformers", "onnxruntime", "vllm"}


def test_it_serves_english_with_no_argument(server: ServerProcess) -> None:
    body = {"prompt": "The history of the United States", "max_tokens": 40, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    words = answer.json()["choices"][0]["text"].lower().split()
    common = {"the", "of", "and", "in", "a", "to", "was", "is", "for", "by", "on", "as", "that", "with", "it"}
    assert len(words) > 15
    assert sum(word.strip(".,;") in common for word in words) / len(words) > 0.2


def test_the_other_commands_say_what_they_need(python: Path) -> None:
    osp = python.with_name("osp")
    assert "train" in subprocess.run([str(osp), "--help"], capture_output=True, text=True, check=True).stdout
    for command in (
        ["train", "--data", "x", "--out", "y"],
        ["quantize", "x", "--out", "y"],
        ["eval", "demo", "--data", "x", "--engine", "torch"],
    ):
        refused = subprocess.run([str(osp), *command], capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "pip install 'osp-runtime[" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("model", ["demo", "demo-16bit"])
def test_both_bundled_models_are_in_the_wheel(python: Path, model: str) -> None:
    done = subprocess.run(
        [str(python.with_name("osp")), "info", model, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["quality"]["perplexity_16bit"] > 1
