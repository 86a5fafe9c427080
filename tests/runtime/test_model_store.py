from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from runtime import model_store
from runtime.model_store import ModelNotFoundError, recorded_quality, resolve_model


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the demo model in it and the 16-bit one left out."""
    monkeypatch.setattr(model_store, "_BUNDLE", tmp_path / "bundle")
    (tmp_path / "bundle" / "demo").mkdir(parents=True)
    (tmp_path / "bundle" / "demo" / "config.json").write_text("{}")
    return tmp_path / "bundle"


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "runs" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("runs/final") == Path("runs/final")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/runs") == tmp_path / "runs"


def test_a_bundled_name_is_never_a_directory_that_happens_to_be_there(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo") == bundle / "demo"
    assert resolve_model("./demo") == Path("demo")


def test_a_bundled_model_that_was_left_out(bundle: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="not part of this installation"):
        resolve_model("demo-16bit")


@pytest.mark.parametrize("name", ["nosuch", "a/b/c", "../b", "/nosuch/model", "owner/", "owner/na me"])
def test_a_name_of_nothing_says_what_names_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelNotFoundError, match=r"directory.*demo-16bit.*owner/name"):
        resolve_model(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~nosuchuser/x", "home directory"),
        ("~nosuchuser", "home directory"),
        ("x" * 300, "too long"),
        ("owner/" + "x" * 300, "maximum length"),
        ("/" + "x/" * 5000, "too long"),
        ("loop", "'loop'"),
    ],
)
def test_a_name_that_cannot_be_looked_up(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=reason):
        resolve_model(name)


@pytest.mark.parametrize("quality", [None, "good", ["good"], 5, 0.5, True, {}, {"ratio": 1.5}])
def test_only_an_object_is_a_recorded_quality(quality: object) -> None:
    assert recorded_quality({"quality": quality}) == (quality if isinstance(quality, dict) else None)
    assert recorded_quality({}) is None


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_hub_name_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name-1.4B") == tmp_path
    assert asked == {"owner/name-1.4B": ["*.json", "*.safetensors", "*.jinja"]}


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RepositoryNotFoundError, "no such model on Hugging Face"),
        (GatedRepoError, "ask for access"),
        (LocalEntryNotFoundError, "cannot be reached"),
        (OSError, "cannot be downloaded.*disk full"),
    ],
)
def test_a_failed_download_says_what_to_do(
    error: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        failure = error.__new__(error)  # the hub's own errors want an HTTP response
        failure.args = ("disk full\nSee https://…",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=advice) as raised:
        resolve_model("owner/name")
    assert "\n" not in str(raised.value)
