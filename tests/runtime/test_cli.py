from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from quant.arithmetic import NonFiniteError
from quant.llama import CheckpointError
from quant.scheme import SchemeError
from quant.text import TextError
from runtime import cli
from runtime.engine.registry import UnknownEngineError
from runtime.evaluate import NothingToScoreError
from runtime.model_store import ModelNotFoundError
from runtime.text.tokenizer import TokenizerError


def osp(*arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(cli.main, arguments)
    return SimpleNamespace(code=result.exit_code, output=result.output, exception=result.exception)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Commands by name, in place of the installed ones: a click command, or the error that loading it raises."""
    commands: dict[str, object] = {}

    class Stage(EntryPoint):
        def load(self) -> object:
            if isinstance(commands[self.name], Exception):
                raise commands[self.name]
            return commands[self.name]

    def entry_points(group: str, name: str | None = None) -> EntryPoints:
        assert group == "osp.commands"
        return EntryPoints(Stage(known, "any:thing", group) for known in commands if name in (None, known))

    monkeypatch.setattr(cli, "entry_points", entry_points)
    return commands


def failing(error: Exception) -> click.Command:
    @click.command(short_help="Fails.")
    def command() -> None:
        raise error

    return command


def test_version_and_an_unknown_command() -> None:
    assert osp("--version").output.strip() == f"osp, version {importlib.metadata.version('osp-runtime')}"
    assert osp("nosuch").code == 2


def test_help_lists_every_stage_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom runtime.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in run.stdout
    for command in ("train", "quantize", "serve", "info", "eval"):
        assert f"\n  {command} " in run.stdout


def test_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "serve", "-h"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("Usage: osp serve")


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError(Path("dir"), "is empty"),
        ModelNotFoundError("no model"),
        NonFiniteError("it is nan"),
        NothingToScoreError("no document"),
        SchemeError("no scheme"),
        TextError("no text"),
        TokenizerError("no tokenizer"),
        UnknownEngineError("warp"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(stages: dict[str, object], error: Exception) -> None:
    stages["fail"] = failing(error)
    result = osp("fail")
    assert result.code == 1
    assert result.output == f"Error: {error}\n"


def test_a_fault_of_ours_is_a_traceback(stages: dict[str, object]) -> None:
    stages["fail"] = failing(ValueError("a bug"))
    assert isinstance(osp("fail").exception, ValueError)


def test_a_missing_extra_is_named(stages: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda package: None)
    missing = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    stages["at-import"], stages["at-run"] = missing, failing(missing)
    assert "at-import  (not available: needs torch)" in osp("--help").output
    for command in stages:
        result = osp(command, *(["--some", "option"] if command == "at-import" else []))
        assert result.code == 1
        assert "pip install 'osp-runtime[quant]' or pip install 'osp-runtime[train]'" in result.output


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'nosuch'", name="nosuch"),
        ModuleNotFoundError("No module named 'trainer.nosuch'", name="trainer.nosuch"),
        ModuleNotFoundError("No module named 'torch.nosuch'", name="torch.nosuch"),  # torch itself is there
        ModuleNotFoundError("no name at all"),
        ImportError("cannot import name 'nosuch' from 'torch'", name="torch"),
    ],
)
def test_an_import_that_fails_for_another_reason_is_a_bug(stages: dict[str, object], error: ImportError) -> None:
    stages["at-run"] = failing(error)
    assert osp("at-run").exception is error
    stages["at-import"] = error
    assert osp("at-import").exception is error


def test_extras_come_from_the_package_itself() -> None:
    assert cli.extras_with("onnxruntime") == ["onnx"]
    assert cli.extras_with("numpy") == []
    assert cli.extras_with("tor") == []
