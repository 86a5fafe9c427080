"""Builds the images without a container engine and looks whether they do what docs/deploy.md says: make test-images

Needs root, buildah, debootstrap and util-linux. On a base of Debian's own packages, as no registry is asked:

1. builds each target;
2. runs `cpu` as its own user on a read-only root, as process 1, with a model volume, and asks for a completion;
3. sends SIGTERM while requests run: all of them must be answered, new ones be refused, and the exit code be 0;
4. prints sizes.

gpu and jetson are built on the same base, without vLLM: our layers and the entry point are what is seen there.
`--volume HOST:CONTAINER` mounts what pip needs on this machine: certificates, settings.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAND_IN = "localhost/osp-stand-in"
TARGETS = ("cpu", "loadtest", "gpu", "jetson")
PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
SIZE_LIMIT_MB = 350
ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}


class CheckError(Exception):
    """An image does not do what it should."""


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


def build(target: str, volumes: list[str]) -> str:
    """Builds a target and gives the image's name."""
    name = f"localhost/osp-runtime:{target}"
    bases = [f"{image}={STAND_IN}" for image in ("PYTHON_IMAGE", "VLLM_IMAGE", "JETSON_IMAGE")]
    options = [*(o for base in bases for o in ("--build-arg", base)), *(o for v in volumes for o in ("--volume", v))]
    # Docker's format: the other one has no HEALTHCHECK.
    form = ("--format=docker", "--pull-never", "--network=host", "--layers")
    buildah("bud", *form, "--target", target, *options, "-t", name, str(ROOT))
    return name


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


def megabytes(root: Path) -> float:
    """Megabytes of the files under a directory."""
    done = subprocess.run(["du", "-sx", "--bytes", str(root)], check=True, text=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[0]) / 1e6


class Running:
    """An image's entry point as process 1 of a PID namespace: read-only root, its own user, /cache and /tmp in memory.

    Attributes:
        pid: the process, as it is seen from here.
        url: where the server listens.
    """

    def __init__(self, root: Path, settings: dict[str, Any], model: Path, *arguments: str) -> None:
        script = f"""
            set -e
            mount --bind {root} {root}; mount -o remount,bind,ro {root}
            mount -t tmpfs tmpfs {root}/tmp; mount -t tmpfs -o uid=10001,gid=10001 tmpfs {root}/cache
            mount -t proc proc {root}/proc; mount --rbind /dev {root}/dev; mount --bind {model} {root}/models
            mount -o remount,bind,ro {root}/models
            exec chroot --userspec={settings["User"]} --groups= {root} env -i {" ".join(settings["Env"])} "$@"
        """
        command = [*settings["Entrypoint"], *arguments]
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *command],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log: list[str] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._serving.wait(120) or not (found := re.search(r"serving .* at (http\S+)", "".join(self._log))):
            self.close()
            raise CheckError("the server did not start:\n" + "".join(self._log))
        self.url = found[1].rstrip(";").replace("0.0.0.0", "127.0.0.1")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text("utf-8")
        self.pid = int(children)

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the process."""
        lines = Path(f"/proc/{self.pid}/status").read_text("utf-8").splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        return self._unshare.wait(timeout=seconds)

    def close(self) -> None:
        """Ends it, if it is still there."""
        self._unshare.kill()
        self._unshare.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._unshare.stderr is not None
        for line in self._unshare.stderr:
            self._log.append(line)
            if re.search(r"serving .* at http", line):
                self._serving.set()
        self._serving.set()


def complete(url: str, tokens: int, texts: int = 1) -> dict[str, Any]:
    """The answer to a completion in so many texts of so many tokens."""
    body = json.dumps({"prompt": "The history of", "max_tokens": tokens, "n": texts, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def require(condition: bool, what: str) -> None:
    """Prints what is so, or ends the check."""
    if not condition:
        raise CheckError(f"not so: {what}")
    print(f"  {what}")  # noqa: T201


def is_read_only(directory: Path) -> bool:
    """Whether not even root can write there."""
    try:
        (directory / "written").touch()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def check_drain(server: Running) -> None:
    """SIGTERM while eight requests run, of 51,200 tokens together: seconds of work."""
    answers: list[int] = []

    def ask() -> None:
        answers.append(complete(server.url, 400, 16)["usage"]["completion_tokens"])

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    time.sleep(0.5)
    require(not answers, "eight requests are running")
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(0.1)
    try:
        complete(server.url, 1)
        refused = False
    except (urllib.error.HTTPError, urllib.error.URLError):
        refused = True
    require(refused, "a new request is refused while the server drains")
    for client in clients:
        client.join()
    require(answers == [16 * 400] * 8, "every running request is answered to its end")
    require(server.wait(30) == 0, "the exit code is 0")


def check_cpu(image: str, model: Path) -> None:
    """Runs the image as docs/deploy.md says, and drains it."""
    with unpacked(image) as (root, settings):
        require(settings["Entrypoint"] == ["osp"], "the entry point is no shell")
        server = Running(root, settings, model, "serve", "volume=/models", "--port", "0")
        try:
            status = server.status()
            require(status["Uid"].split()[0] == "10001", "the user is not root")
            require(status["NSpid"].split()[-1] == "1", "the server is process 1")
            answer = complete(server.url, 8)
            require(answer["model"] == "volume" and answer["usage"]["completion_tokens"] == 8, "a completion comes")
            with urllib.request.urlopen(f"{server.url}/metrics") as response:
                require('engine="native"' in response.read().decode(), "by the native engine")
            inside = Path(f"/proc/{server.pid}/root")
            for name in ("", "models"):
                require(is_read_only(inside / name), f"/{name} is read-only")
            require((inside / "cache").stat().st_uid == 10001, "/cache is the user's")
            check_drain(server)
        finally:
            server.close()


def sizes(target: str, image: str) -> float:
    """Prints and gives the megabytes that a target adds to its base."""
    with unpacked(image) as (root, _), unpacked(STAND_IN) as (base, _):
        added = megabytes(root) - megabytes(base)
    print(f"{target}: {added:.0f} MB unpacked, without the base")  # noqa: T201
    return added


def main() -> None:
    """Builds and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, choices=TARGETS, metavar="TARGET")
    parser.add_argument("--volume", action="append", default=[], metavar="HOST:CONTAINER", help="for builds, read-only")
    parser.add_argument("--work", type=Path, default=ROOT / "build/images", help="where the base is made")
    parser.add_argument("--suite", default="bookworm", help="Debian's, for the base")
    parser.add_argument("--model", type=Path, default=ROOT / "runtime/models/demo", help="what the volume has")
    options = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        sys.exit(f"needs root and {', '.join(missing) or 'nothing else'}")
    options.work.mkdir(parents=True, exist_ok=True)
    make_base(options.work, options.suite)
    try:
        for target in options.targets:
            image = build(target, [f"{volume}:ro" for volume in options.volume])
            if target == "cpu":
                check_cpu(image, options.model.resolve())
            added = sizes(target, image)
            require(target != "cpu" or added < SIZE_LIMIT_MB, f"{target} is small enough")
    except CheckError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
