"""buildah builds a Dockerfile without a container engine: a base of Debian's own packages, a target, its files."""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAND_IN = "localhost/osp-stand-in"
BASES = ("PYTHON_IMAGE", "VLLM_IMAGE")
PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
# Where neither namespaces nor an engine can be counted on, a chroot isolates enough for a build.
ENVIRONMENT = {"BUILDAH_ISOLATION": "chroot", **os.environ}


def buildah(*arguments: str, quiet: bool = False) -> str:
    """What `buildah ARGUMENTS` writes to stdout.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr has been shown.
    """
    done = subprocess.run(
        ["buildah", *arguments],
        env=ENVIRONMENT,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
    )
    return done.stdout.strip()


def make_base(work: Path, suite: str) -> None:
    """Commits an image of Debian with Python under STAND_IN, unless there is one."""
    with contextlib.suppress(subprocess.CalledProcessError):
        buildah("inspect", "--type", "image", STAND_IN, quiet=True)
        return
    rootfs = work / "rootfs"
    if not rootfs.exists():
        begun = work / "rootfs.begun"
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(begun)], check=True)
        begun.rename(rootfs)
    # vLLM's image lets pip install into the system's Python; Debian has a mark against it.
    for mark in rootfs.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(rootfs), "/")
    buildah("commit", "--quiet", container, STAND_IN)
    buildah("rm", container)


def build(target: str, source: Path, volumes: list[str]) -> str:
    """Builds a target of the Dockerfile in `source` on the stand-in base, and gives the image's name.

    Args:
        volumes: HOST:CONTAINER, there while it is built and not in the image.
    """
    name = f"localhost/osp-runtime:{target}"
    options = [option for base in BASES for option in ("--build-arg", f"{base}={STAND_IN}")]
    options += [option for volume in volumes for option in ("--volume", f"{volume}:ro")]
    # Docker's format: the other one has no HEALTHCHECK.
    form = ("--format=docker", "--pull-never", "--network=host", "--layers")
    buildah("bud", *form, "--target", target, *options, "-t", name, str(source))
    return name


def pip_volumes(work: Path) -> list[str]:
    """What pip needs to reach its packages as it does on this machine, as volumes for a build.

    That is one file with the settings of all of pip's files and of the environment, and every path which they name:
    certificates, constraints, directories of packages.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, text=True, capture_output=True)
    settings: dict[str, str] = {}
    if bundle := os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE"):
        settings["cert"] = bundle
    # The environment beats the files.
    for section in ("global", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed.stdout, re.MULTILINE):
            settings[name] = ast.literal_eval(value)
    settings.pop("config-file", None)
    file = work / "pip.conf"
    parser = configparser.RawConfigParser()
    parser["global"] = settings
    with file.open("w", encoding="utf-8") as stream:
        parser.write(stream)
    words = {word for value in settings.values() for word in value.split()}
    paths = {Path(word) for word in words if word.startswith("/")}
    # The pages of an index link to packages beside it.
    paths |= {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")}
    return [f"{file}:/etc/pip.conf", *(f"{path}:{path}" for path in sorted(paths) if path.exists())]


@contextlib.contextmanager
def unpacked(image: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(the root file system of an image, its settings)"""
    container = buildah("from", "--pull-never", image)
    try:
        settings = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
        yield Path(buildah("mount", container)), settings
    finally:
        buildah("umount", container)
        buildah("rm", container)


def added_megabytes(image: str) -> float:
    """Megabytes of the files that an image adds to its base."""

    def total(root: Path) -> float:
        done = subprocess.run(["du", "-sx", "--bytes", str(root)], check=True, text=True, stdout=subprocess.PIPE)
        return int(done.stdout.split()[0]) / 1e6

    with unpacked(image) as (root, _), unpacked(STAND_IN) as (base, _):
        return total(root) - total(base)
