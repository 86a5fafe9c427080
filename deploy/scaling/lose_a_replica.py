"""Two replicas of `osp serve` behind nginx, one of which is killed under load: what do clients see?

    python deploy/scaling/lose_a_replica.py demo-16bit -- --engine vllm --vllm.enforce-eager --vllm.max-num-seqs=16

What follows `--` goes to `osp serve`. Clients stream answers all the time. A stream that the killed replica was in the
middle of is cut off, and its client sees that; no other request may fail. Exits with 0 if it was so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

CLIENTS = 8
BEFORE_S, AFTER_S = 10.0, 20.0
TOKENS = 100


@dataclass
class Outcomes:
    """How requests ended, by when they began: "before" the loss or "after" it.

    Attributes:
        ended: how many answers were whole.
        cut_off: the replicas whose streams were cut off.
        failed: why other requests had no answer.
        lost_at: when the replica was killed, by `time.monotonic`.
    """

    ended: Counter[str] = field(default_factory=Counter)
    cut_off: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lost_at: float = float("inf")

    def within(self, since: float) -> str:
        return "before" if since < self.lost_at else "after"


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that all of a replica can be killed at once."""
    print("+", " ".join(command), flush=True)  # noqa: T201 - a script's output
    return subprocess.Popen(command, start_new_session=True)


def configure(ports: list[int]) -> Path:
    """nginx.conf with the ports of two replicas and of the router, in a directory that nginx may write to."""
    directory = Path(tempfile.mkdtemp())
    text = (Path(__file__).parent / "nginx.conf").read_text("utf-8")
    for before, after in zip(("127.0.0.1:8001", "127.0.0.1:8002", "listen 8000"), ports, strict=True):
        text = text.replace(before, before[:-4] + str(after))
    text = text.replace("/tmp/osp-nginx.pid", str(directory / "nginx.pid"))
    # Where a distribution's nginx would keep bodies, and only root may write.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = text.replace("http {", "http {" + "".join(f"{kind}_temp_path {directory / kind};" for kind in kinds), 1)
    (directory / "nginx.conf").write_text(text, "utf-8")
    return directory / "nginx.conf"


async def ready(url: str, patience_s: float = 400) -> None:
    """Waits until a server is ready."""
    async with httpx.AsyncClient() as client:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            try:
                if (await client.get(url, timeout=5)).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(0.5)
    raise TimeoutError(f"{url} is not ready after {patience_s:g} s")


class CutOffError(RuntimeError):
    """A stream that ended before its time; `replica` had begun it."""

    def __init__(self, replica: str) -> None:
        super().__init__(f"cut off by {replica}")
        self.replica = replica


async def stream(client: httpx.AsyncClient, model: str, seed: int) -> None:
    """One streamed answer, to its end; raises if there is none, and `CutOffError` if it is not whole."""
    body = {"model": model, "prompt": "The history of", "max_tokens": TOKENS, "ignore_eos": True, "seed": seed}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        try:
            lines = [line async for line in response.aiter_lines() if line]
        except httpx.TransportError:
            lines = []
    if not lines or lines[-1] != "data: [DONE]" or "error" in json.loads(lines[-2].removeprefix("data: ")):
        raise CutOffError(response.headers["x-replica"])


async def load(url: str, model: str, outcomes: Outcomes, until: float) -> None:
    """`CLIENTS` clients, each of which asks again as soon as it is answered."""

    async def ask(number: int, client: httpx.AsyncClient) -> None:
        seed = number
        while (began := time.monotonic()) < until:
            seed += CLIENTS
            try:
                await stream(client, model, seed)
                outcomes.ended[outcomes.within(began)] += 1
            except CutOffError as error:
                outcomes.cut_off.append(error.replica)
            except (httpx.HTTPError, RuntimeError) as error:
                outcomes.failed.append(f"{type(error).__name__}: {error}")

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(ask(number, client) for number in range(CLIENTS)))


async def main() -> int:
    """Starts everything, kills one replica in the middle, and says how the requests ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nginx", default="nginx", help="the program nginx")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, to_serve = parser.parse_args(words[:end]), words[end + 1 :]
    ports = [free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    serve = [sys.executable, "-m", "runtime.cli", "serve", arguments.model, *to_serve]
    processes = []
    try:
        replicas = []
        for port, url in zip(ports[:2], urls[:2], strict=True):
            replicas.append(start([*serve, "--port", str(port)]))
            processes.append(replicas[-1])
            await ready(f"{url}/ready")
        configuration = configure(ports)
        processes.append(start([arguments.nginx, "-e", "stderr", "-c", str(configuration), "-g", "daemon off;"]))
        await ready(f"{urls[2]}/health")
        outcomes, began = Outcomes(), time.monotonic()
        clients = asyncio.create_task(load(urls[2], arguments.model, outcomes, began + BEFORE_S + AFTER_S))
        await asyncio.sleep(BEFORE_S)
        outcomes.lost_at = time.monotonic()
        kill_group(replicas[0])
        await clients
    finally:
        for process in processes:
            kill_group(process)
    return report(outcomes, lost=f"127.0.0.1:{ports[0]}")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `start` made, and its children."""
    subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=False, stderr=subprocess.DEVNULL)
    process.wait()


def report(outcomes: Outcomes, lost: str) -> int:
    """Prints how it went; 0 if nothing was lost but what ran on the replica `lost`."""
    others = [replica for replica in outcomes.cut_off if replica != lost]
    summary = {
        "whole": dict(outcomes.ended),
        "cut_off_on_the_lost_replica": len(outcomes.cut_off) - len(others),
        "cut_off_elsewhere": len(others),
        "without_an_answer": outcomes.failed[:10],
    }
    print(json.dumps(summary, indent=2))  # noqa: T201
    return 0 if not others and not outcomes.failed and outcomes.ended["after"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
