"""SIGTERM under load, and clients that leave in the middle."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
from exposition import samples_of, total
from sabotage import STEPS
from server_process import ServerProcess, running_server

TOKENS = 40


def body(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "seed": seed, **more}


def texts_of(lines: list[str]) -> str:
    return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)


async def streamed(client: httpx.AsyncClient, seed: int, leave_after: int | None = None) -> str | None:
    """The text of a streamed answer; None if the client has left in the middle."""
    lines: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body(seed, stream=True)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
            if leave_after is not None and len(lines) >= leave_after:
                return None
    assert lines.pop() == "data: [DONE]"
    return texts_of(lines)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """How much is going on in the engine."""
    samples = samples_of((await client.get("/metrics")).text)
    names = ("osp_num_requests_running", "osp_num_requests_waiting", "osp_kv_cache_usage_perc")
    return {name: total(samples, name) for name in names}


def test_sigterm_under_load_loses_no_finished_answer(checkpoint: Path) -> None:
    async def load(server: ServerProcess) -> tuple[list[Any], list[int | str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            whole = [asyncio.create_task(client.post("/v1/completions", json=body(seed))) for seed in range(8)]
            streams = [asyncio.create_task(streamed(client, seed)) for seed in range(8)]
            while (await gauges(client))["osp_num_requests_running"] < 16:
                await asyncio.sleep(0.01)
            server.process.terminate()
            await asyncio.to_thread(server.log.wait_for, "shutting down")
            late: list[int | str] = []
            # A server that still drains still answers: probes say that it goes, and new requests are told to go.
            for path in ("/health", "/ready", "/metrics"):
                async with httpx.AsyncClient(base_url=server.url) as new:
                    late.append((await new.get(path)).status_code)
            async with httpx.AsyncClient(base_url=server.url) as new:
                refused = await new.post("/v1/completions", json=body(0))
                late += [refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]]
            answers = [response.json()["choices"][0]["text"] for response in await asyncio.gather(*whole)]
            return [answers, await asyncio.gather(*streams)], late

    before = STEPS.format(seconds=0.02)
    with running_server(str(checkpoint), "--engine", "reference", before=before) as server:
        (answers, streams), late = asyncio.run(load(server))
        assert server.process.wait(timeout=30) == 0
    assert late == [200, 503, 200, 503, "shutting_down", "1"]
    assert answers == streams  # seed by seed
    assert all(answers)


def test_two_hundred_clients_of_which_half_leave(server: ServerProcess) -> None:
    rng = random.Random(5)
    leaving = {seed: rng.randint(1, TOKENS - 1) for seed in rng.sample(range(200), 100)}

    async def crowd() -> list[str | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            crowd = await asyncio.gather(*(streamed(client, seed, leaving.get(seed)) for seed in range(200)))
            async with asyncio.timeout(20):
                while any((await gauges(client)).values()):
                    await asyncio.sleep(0.05)
            stayed = [seed for seed in range(200) if seed not in leaving]
            for seed in rng.sample(stayed, 5):  # what the others did has changed nothing
                assert await streamed(client, seed) == crowd[seed]
        return crowd

    texts = asyncio.run(crowd())
    assert [seed for seed, text in enumerate(texts) if text is None] == sorted(leaving)
