"""Manifests, compose files, the unit and the Dockerfile: what can be said without a cluster or a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = [file for file in sorted(KUBERNETES.glob("base/*.yaml")) if file.name != "kustomization.yaml"]
OVERLAYS = {"cpu": KUBERNETES, "gpu": KUBERNETES / "gpu"}


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text("utf-8"))


DEPLOYMENT = load(KUBERNETES / "base/deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_follow_kubernetes_schema(file: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(load(file), "1.33", strict=True)


def test_the_schema_refuses_what_is_wrong() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    wrong = load(KUBERNETES / "base/deployment.yaml")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    with pytest.raises(validate.ValidationError, match="terminationGracePeriod"):
        validate.validate(wrong, "1.33", strict=True)


def test_kustomizations_name_files_that_are_there() -> None:
    base = load(KUBERNETES / "base/kustomization.yaml")
    assert {file.name for file in MANIFESTS} == set(base["resources"])
    for directory in OVERLAYS.values():
        for resource in load(directory / "kustomization.yaml")["resources"]:
            assert (directory / resource).resolve() == KUBERNETES / "base"
    gpu = load(KUBERNETES / "gpu/kustomization.yaml")
    patch = load(KUBERNETES / "gpu" / gpu["patches"][0]["path"])
    assert (patch["kind"], patch["metadata"]["name"]) == ("Deployment", DEPLOYMENT["metadata"]["name"])
    assert patch["spec"]["template"]["spec"]["containers"][0]["name"] == CONTAINER["name"]


@pytest.mark.parametrize("tag", OVERLAYS)
def test_kustomize_builds_what_follows_the_schema(tag: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    tools = {"kustomize": ["build"], "kubectl": ["kustomize"]}
    tool = next((name for name in tools if shutil.which(name)), None)
    if tool is None:
        pytest.skip("neither kustomize nor kubectl in the PATH")
    run = subprocess.run([tool, *tools[tool], str(OVERLAYS[tag])], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(run.stdout)}
    assert manifests.keys() == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for manifest in manifests.values():
        validate.validate(manifest, "1.33", strict=True)
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"osp-runtime:{tag}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (tag == "gpu")


def test_the_grace_period_is_above_pre_stop_and_drain() -> None:
    environment = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    pre_stop = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > pre_stop + float(environment["OSP_DRAIN_TIMEOUT"])


def test_docker_and_systemd_wait_longer_than_the_drain() -> None:
    drain: float = ServerSettings.model_fields["drain_timeout"].default
    for service in load(DEPLOY / "compose.yaml")["services"].values():
        assert "stop_grace_period" not in service or float(service["stop_grace_period"].removesuffix("s")) > drain
    unit = (DEPLOY / "systemd/osp.service").read_text("utf-8")
    assert float(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) > drain  # type: ignore[index]


def test_the_selectors_and_the_autoscaler_mean_the_deployment() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert load(KUBERNETES / "base/service.yaml")["spec"]["selector"].items() <= labels.items()
    assert load(KUBERNETES / "base/budget.yaml")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    autoscaler = load(KUBERNETES / "base/autoscaler.yaml")["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert autoscaler["metrics"][0]["pods"]["metric"]["name"] in (ROOT / "docs/metrics.md").read_text("utf-8")


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_files_mount_and_build_what_is_there(file: Path) -> None:
    compose = load(file)
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    for service in compose["services"].values():
        build = service.get("build", {})
        assert build.get("target", "cpu") in targets
        assert build.get("context", "..") == ".."
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]


def test_what_the_files_set_are_settings() -> None:
    known = {f"OSP_{name.upper()}" for name in ServerSettings.model_fields}
    files = [*COMPOSE, ROOT / "Dockerfile", *MANIFESTS, DEPLOY / "systemd/osp.service"]
    own = {"OSP_MODELS"}  # what compose.yaml reads from the shell
    used = {name for file in files for name in re.findall(r"\bOSP_[A-Z_]+\b", file.read_text("utf-8"))}
    assert used - own <= known


@pytest.mark.parametrize(
    "files",
    [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"], ["compose.ab.yaml"]],
    ids=lambda files: "+".join(files),
)
def test_docker_compose_takes_the_files(files: list[str], tmp_path: Path) -> None:
    command = compose_command()
    for file in COMPOSE:
        compose = load(file)
        # The first generation (1.29) knows all that we use but a project's name.
        if command == ["docker-compose"]:
            compose.pop("name", None)
        (tmp_path / file.name).write_text(yaml.safe_dump(compose), "utf-8")
    environment = {**os.environ, "OSP_MODELS": "w4a4=/models/w4a4", "MODEL_DIR": "/srv/models"}
    command += [*(word for file in files for word in ("-f", file)), "config", "--quiet"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def compose_command() -> list[str]:
    """`docker compose`, or its first generation, whichever there is."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker compose and no docker-compose in the PATH")
    return ["docker-compose"]


def test_the_unit_is_what_systemd_takes() -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze in the PATH")
    run = subprocess.run(
        [analyze, "verify", str(DEPLOY / "systemd/osp.service")], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in run.stderr.splitlines() if line and "osp.service" in line]
    assert all("/opt/osp/bin/osp is not executable" in line for line in complaints), run.stderr


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    run = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_an_image_gets_the_requirements_of_pyproject() -> None:
    script = str(DEPLOY / "requirements.py")
    base = subprocess.check_output([sys.executable, script, "onnx"], text=True).splitlines()
    assert any(line.startswith("fastapi>=") for line in base)
    assert any(line.startswith("onnxruntime>=") for line in base)
    assert not any(line.startswith("torch") for line in base)
    only = subprocess.check_output([sys.executable, script, "loadtest", "--only"], text=True).splitlines()
    assert [line.split(">=")[0] for line in only] == ["aiohttp", "nvidia-ml-py"]
