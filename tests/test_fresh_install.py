"""The wheel in a clean virtual environment, with the base dependencies only: the native engine is there, and the demo
model is served without torch. Where the engine cannot be compiled, the rest is installed all the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, running_server

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from, without what the checkout has compiled."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("trainer", "quant", "runtime"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_osp*.so"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, to: Path, **environment: str) -> tuple[Path, str]:
    """(the wheel, what pip said)"""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(to), str(source)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = to.glob("osp_runtime-*.whl")
    return wheel, done.stdout


@pytest.fixture(scope="module")
def python(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that `pip install osp-runtime` has made."""
    folder = tmp_path_factory.mktemp("install")
    wheel, _ = build_wheel(source, folder)
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


@pytest.mark.skipif(not shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]), reason="there is no C++ compiler")
def test_the_native_engine_is_there(python: Path, tmp_path: Path) -> None:
    code = "import runtime.native._osp; print(runtime.native._osp.__file__)"
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extension = Path(done.stdout.strip())
    assert extension.is_relative_to(python.parents[1])
    assert extension.name == f"_osp{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_without_a_compiler_the_rest_is_installed(source: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(source, tmp_path, CXX="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "The native engine could not be compiled" in said
    names = zipfile.ZipFile(wheel).namelist()
    data = {"runtime/models/demo/osp.safetensors", "quant/calibration.txt", "runtime/server/playground/index.html"}
    assert {"runtime/native/__init__.py", *data} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".hpp"))]


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
