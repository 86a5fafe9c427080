"""Builds of images reach packages as pip does on this machine: with the same settings, and what they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a machine whose pip has a file of settings, a variable, and certificates."""
    for name in ("index/simple", "wheels", "context"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "certificates.pem").touch()
    settings = (
        f"[global]\nextra-index-url =\n    file://{tmp_path}/index/simple\n    https://packages.example.org/simple\n"
    )
    (tmp_path / "pip.conf").write_text(settings, "utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "certificates.pem"))
    script = "import sys, buildah, pathlib; print(*buildah.pip_volumes(pathlib.Path(sys.argv[1])), sep='\\n')"
    command = [sys.executable, "-c", script, str(tmp_path / "context")]
    return subprocess.check_output(command, text=True, cwd=ROOT / "deploy").splitlines()


def test_what_the_settings_name_is_mounted_where_they_name_it(volumes: list[str], tmp_path: Path) -> None:
    mounted = {volume for volume in volumes if volume.startswith(str(tmp_path))}
    paths = ("certificates.pem", "index", "wheels")
    assert mounted >= {f"{tmp_path}/{path}:{tmp_path}/{path}" for path in paths}
    assert f"{tmp_path}/context/pip.conf:/etc/pip.conf" in mounted


def test_pip_itself_reads_the_same_settings(volumes: list[str], tmp_path: Path) -> None:
    """As in a build: of all that sets pip up, only the one file is there."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": f"{tmp_path}/context/pip.conf"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.check_output(command, text=True, env=environment)
    assert f"global.cert='{tmp_path}/certificates.pem'" in listed
    assert f"global.find-links='{tmp_path}/wheels'" in listed
    assert f"file://{tmp_path}/index/simple\\nhttps://packages.example.org/simple" in listed
