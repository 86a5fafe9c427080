"""Metrics of a real engine: its steps, its caches, and what goes wrong in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from exposition import samples_of, total

from quant.format import read_checkpoint
from runtime.engine.base import FinishReason, GenerationRequest, SamplingParams
from runtime.engine.local import LocalEngine
from runtime.engine.reference import ReferenceRunner
from runtime.server.app import create_app
from runtime.server.catalog import ModelCatalog, ServedModel
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


class Laboratory:
    """A real engine behind the metrics, whose runner can be made to yield NaN."""

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        self.runner = ReferenceRunner(read_checkpoint(checkpoint))
        self.telemetry = Telemetry()
        self.model = ServedModel("lab", LocalEngine(self.runner), tokenizer, self.telemetry)
        self.app = create_app(ServerSettings(), ModelCatalog([self.model]), self.telemetry)

    async def post(self, **body: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            return await client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4} | body)

    def spoil(self) -> None:
        healthy = self.runner.step

        def step(batch: Any) -> Any:
            logits = healthy(batch)
            logits.rows()[:] = np.nan
            return logits

        self.runner.step = step  # type: ignore[method-assign]


def test_steps_caches_and_corrupt_logits_of_a_real_engine(checkpoint: Path, tokenizer: Tokenizer) -> None:
    lab = Laboratory(checkpoint, tokenizer)

    async def main() -> Iterable[httpx.Response]:
        prompt = list(range(1, 41))
        good = [await lab.post(prompt=prompt, ignore_eos=True) for _ in range(2)]
        lab.spoil()
        bad = await lab.post()
        await lab.model.engine.shutdown(0)
        return *good, bad

    first, second, bad = run(main())
    assert first.status_code == second.status_code == 200
    assert bad.status_code == 500
    assert bad.json()["error"]["code"] == "generation_failed"
    samples = samples_of(lab.telemetry.exposition().decode())
    assert total(samples, "osp_corrupted_requests_total") == 1
    assert total(samples, "osp_request_success_total", finished_reason="error") == 1
    cached = total(samples, "osp_prompt_tokens_cached_total")
    assert 0 < cached < 40
    assert cached == total(samples, "osp_prefix_cache_hits_total")
    assert total(samples, "osp_prompt_tokens_total") == 80
    assert total(samples, "osp_engine_step_seconds_count") == 4 + 4 + 1
    assert total(samples, "osp_engine_step_tokens_sum") == 80 - cached + 3 + 3 + 3
    assert total(samples, "osp_engine_step_seconds_sum") > 0


def test_an_engine_that_passes_through_the_metrics_is_the_engine(checkpoint: Path, tokenizer: Tokenizer) -> None:
    lab = Laboratory(checkpoint, tokenizer)
    request = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=6, seed=3, logprobs=2), n=2)

    async def main() -> tuple[list[Any], list[Any]]:
        direct = LocalEngine(lab.runner)
        mine = sorted([chunk async for chunk in direct.generate(request)], key=lambda chunk: chunk.index)
        await direct.shutdown(0)
        through = [chunk async for chunk in lab.model.engine.generate(replace(request, request_id="b"))]
        await lab.model.engine.shutdown(0)
        return mine, sorted(through, key=lambda chunk: chunk.index)

    direct, through = run(main())
    assert direct == through
    assert direct[-1].finish_reason is FinishReason.LENGTH
