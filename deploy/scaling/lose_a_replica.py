"""Two replicas of `osp serve` behind vllm-router, one of which is killed under load: what do clients see?

    python deploy/scaling/lose_a_replica.py demo-16bit --router "$(which vllm-router)" \
        -- --engine vllm --vllm.enforce-eager --vllm.max-num-seqs=16

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
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

CLIENTS = 8
BEFORE_S, AFTER_S = 10.0, 20.0
TOKENS = 100


@dataclass
class Outcomes:
    """How requests ended, by when they began: "before" the loss or "after" it.

    Attributes:
        ended: how many answers were whole.
        failed: when others began, and why they failed.
        lost_at: when the replica was killed, by `time.monotonic`.
    """

    ended: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[float, str]] = field(default_factory=list)
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


async def stream(client: httpx.AsyncClient, model: str, seed: int) -> None:
    """One streamed answer, to its end; raises if it is not whole."""
    body = {"model": model, "prompt": "The history of", "max_tokens": TOKENS, "ignore_eos": True, "seed": seed}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        lines = [line async for line in response.aiter_lines() if line]
    if not lines or lines[-1] != "data: [DONE]":
        raise RuntimeError("the stream was cut off")
    if "error" in json.loads(lines[-2].removeprefix("data: ")):
        raise RuntimeError(lines[-2])


async def load(url: str, model: str, outcomes: Outcomes, until: float) -> None:
    """`CLIENTS` clients, each of which asks again as soon as it is answered."""

    async def ask(number: int, client: httpx.AsyncClient) -> None:
        seed = number
        while (began := time.monotonic()) < until:
            seed += CLIENTS
            try:
                await stream(client, model, seed)
                outcomes.ended[outcomes.within(began)] += 1
            except (httpx.HTTPError, RuntimeError) as error:
                outcomes.failed.append((began, f"{type(error).__name__}: {error}"))

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(ask(number, client) for number in range(CLIENTS)))


async def running_on(url: str) -> int:
    """How many sequences a replica runs."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    names = ("osp_num_requests_running{", "osp_num_requests_waiting{")
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))


async def main() -> int:
    """Starts everything, kills one replica in the middle, and says how the requests ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--router", default="vllm-router", help="the program vllm-router")
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
        router = ["--port", str(ports[2]), "--policy", "round_robin", "--worker-urls", *urls[:2]]
        router += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--log-level", "warning"]
        processes.append(start([arguments.router, *router]))
        await ready(f"{urls[2]}/health")
        outcomes, began = Outcomes(), time.monotonic()
        clients = asyncio.create_task(load(urls[2], arguments.model, outcomes, began + BEFORE_S + AFTER_S))
        await asyncio.sleep(BEFORE_S)
        most_cut, spared = await running_on(urls[0]), await running_on(urls[1])
        outcomes.lost_at = time.monotonic()
        kill_group(replicas[0])
        await clients
    finally:
        for process in processes:
            kill_group(process)
    return report(outcomes, most_cut, spared)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `start` made, and its children."""
    subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=False, stderr=subprocess.DEVNULL)
    process.wait()


def report(outcomes: Outcomes, most_cut: int, spared: int) -> int:
    """Prints how it went; 0 if nothing was lost but what ran on the lost replica."""
    cut = [why for began, why in outcomes.failed if outcomes.within(began) == "before"]
    lost = [why for began, why in outcomes.failed if outcomes.within(began) == "after"]
    summary = {
        "whole": dict(outcomes.ended),
        "ran_on_the_lost_replica": most_cut,
        "ran_on_the_other": spared,
        "cut_off": len(cut),
        "lost": lost,
    }
    print(json.dumps(summary, indent=2))  # noqa: T201
    return 0 if not lost and len(cut) <= most_cut and outcomes.ended["after"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
