"""Builds the images without a container engine and looks whether they do what docs/deploy.md says: make test-images

Needs root, buildah, debootstrap and util-linux. On a base of Debian's own packages, as no registry is asked:

1. `cpu` serves a model from a volume, by each of its engines, as its own user on a read-only root and as process 1.
   SIGTERM while requests run: all of them must be answered, new ones be refused, and the exit code be 0.
2. `loadtest` puts `cpu` under a small load and leaves its report.
3. `gpu` and `jetson` have neither vLLM nor torch there: what is seen is our layers and the entry point, which has to
   serve by the native engine, and to say that vLLM is not there when it is asked for.

pip is set up in the builds as it is on this machine.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from buildah import added_megabytes, build, buildah, make_base, pip_volumes, unpacked
from container import Container, ContainerError

ROOT = Path(__file__).parents[1]
SIZE_LIMIT_MB = 350
# A busy machine takes longer than the default for what check_drain lets run.
DRAIN_S = ("--drain-timeout", "120")


class CheckError(Exception):
    """An image does not do what it should."""


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
    print(f"  {what}", flush=True)  # noqa: T201


def is_read_only(directory: Path) -> bool:
    """Whether not even root can write there."""
    try:
        (directory / "written").touch()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def metrics(url: str) -> str:
    """What Prometheus would get."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text: str = response.read().decode()
        return text


def prompts_begun(url: str) -> float:
    """How many prompts the server has computed, or begun to answer."""
    return sum(map(float, re.findall(r"^osp_request_prompt_tokens_count\{.*\} (\S+)$", metrics(url), re.MULTILINE)))


def check_answer(url: str, engine: str) -> None:
    """A completion comes, and the metrics say from which engine."""
    require(complete(url, 8)["usage"]["completion_tokens"] == 8, "a completion comes")
    require(f'engine="{engine}"' in metrics(url), f"from the engine {engine}")


def check_isolation(server: Container) -> None:
    """User, process and file systems are as docs/deploy.md says; /models is a volume."""
    status = server.status()
    require(status["Uid"].split()[0] == "10001", "the user is not root")
    require(status["NSpid"].split()[-1] == "1", "the server is process 1")
    inside = Path(f"/proc/{server.pid}/root")
    for name in ("", "models"):
        require(is_read_only(inside / name), f"/{name} is read-only")
    require((inside / "cache").stat().st_uid == 10001, "/cache is the user's")


def check_drain(server: Container) -> None:
    """SIGTERM while eight requests run, of 12,800 tokens together: seconds of work."""
    url = server.url()
    before = prompts_begun(url)
    answers: list[int] = []

    def ask() -> None:
        answers.append(complete(url, 400, 4)["usage"]["completion_tokens"])

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + 60
    while prompts_begun(url) < before + 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    require(not answers, "eight requests are running")
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(0.1)
    try:
        complete(url, 1)
        refused = False
    except (urllib.error.HTTPError, urllib.error.URLError):
        refused = True
    require(refused, "a new request is refused while the server drains")
    for client in clients:
        client.join()
    require(answers == [4 * 400] * 8, "every running request is answered to its end")
    require(server.wait(30) == 0, "the exit code is 0")


def check_cpu(image: str, model: Path) -> None:
    """Serves a model by both engines, and drains."""
    with unpacked(image) as (root, settings):
        require(settings["Entrypoint"] == ["osp"], "the entry point is no shell")
        arguments = ("serve", "volume=/models", "--port", "0")
        with Container(root, settings, *arguments, "--engine", "onnx", read_only={"/models": model}) as server:
            check_answer(server.url(), "onnx")
        with Container(root, settings, *arguments, *DRAIN_S, read_only={"/models": model}) as server:
            check_answer(server.url(), "native")
            check_isolation(server)
            check_drain(server)
    require(added_megabytes(image) < SIZE_LIMIT_MB, f"less than {SIZE_LIMIT_MB} MB are added to the base")


def check_loadtest(image: str, volumes: list[str]) -> None:
    """A small load on the demo model in a container of its own."""
    served = build("cpu", ROOT, volumes)
    load = ("--num-prompts", "8", "--repeats", "2", "--sweep-seconds", "0", "--out", "/results/report")
    with (
        unpacked(served) as (server_root, server_settings),
        unpacked(image) as (root, settings),
        Container(server_root, server_settings, "serve", "--port", "0") as server,
        tempfile.TemporaryDirectory() as results,
        Container(root, settings, server.url(), *load, writable={"/results": Path(results)}) as client,
    ):
        # A busy machine makes a load test invalid, which is its exit code, and leaves the report all the same.
        client.wait(300)
        files = {file.name for file in Path(results).glob("report/*")}
        if not files >= {"result.json", "report.html", "report.md"}:
            raise CheckError(f"no report was left:\n{client.log}")
        side = json.loads((Path(results) / "report/result.json").read_text("utf-8"))["A"]
        require((side["completed"], side["failed"]) == (8, 0), "a load is answered, and a report left")


def check_on_stand_in(image: str, model: Path) -> None:
    """The entry point of `gpu` and `jetson`, on a base that has neither vLLM nor a GPU."""
    with unpacked(image) as (root, settings):
        with Container(root, settings, "--version") as version:
            require(version.wait(60) == 0, f"osp is there: {version.log.strip()}")
        with Container(root, settings, "serve", "--engine", "vllm") as server:
            require(server.wait(60) == 1 and "needs the package vllm" in server.log, "that vLLM is not there is said")
        arguments = ("serve", "volume=/models", "--engine", "auto", "--port", "0")
        with Container(root, settings, *arguments, *DRAIN_S, read_only={"/models": model}) as server:
            check_answer(server.url(), "native")
            check_isolation(server)
            check_drain(server)


def check(target: str, model: Path, volumes: list[str]) -> None:
    """Builds a target, prints what it adds to its base, and tries it."""
    image = build(target, ROOT, volumes)
    print(f"{target}: {added_megabytes(image):.0f} MB unpacked, without the base")  # noqa: T201
    if target == "cpu":
        check_cpu(image, model)
    elif target == "loadtest":
        check_loadtest(image, volumes)
    else:
        check_on_stand_in(image, model)


def main() -> None:
    """Builds and checks."""
    targets = ("cpu", "loadtest", "gpu", "jetson")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets)}; all by default")
    parser.add_argument("--work", type=Path, default=ROOT / "build/images", help="where the base is made")
    parser.add_argument("--suite", default="bookworm", help="Debian's, for the base")
    parser.add_argument("--model", type=Path, default=ROOT / "runtime/models/demo", help="what the volume has")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(targets):
        parser.error(f"no target {', '.join(unknown)}")
    missing = [name for name in ("buildah", "debootstrap", "unshare") if shutil.which(name) is None]
    if importlib.util.find_spec("pip") is None:
        missing.append(f"pip for {sys.executable}")
    if os.geteuid() != 0 or missing:
        sys.exit(f"needs root and {', '.join(missing) or 'nothing else'}")
    options.work.mkdir(parents=True, exist_ok=True)
    make_base(options.work.resolve(), options.suite)
    volumes = pip_volumes(options.work.resolve())
    try:
        for target in options.targets or targets:
            check(target, options.model.resolve(), volumes)
    except (CheckError, ContainerError) as error:
        sys.exit(str(error))
    finally:
        # Layers of earlier code, a gigabyte each.
        buildah("rmi", "--prune")


if __name__ == "__main__":
    main()
