"""LocalEngine: tokens, refusals, the queue; and greedy text against transformers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch
from history_runner import HistoryRunner
from local_clients import CountingRunner, collect, eventually, idle, request, running
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from quant.format import Checkpoint
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import (
    FinishReason,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    SamplingParams,
    TokenChunk,
)
from runtime.engine.reference import ReferenceRunner


def test_tokens_arrive_one_by_one_and_end() -> None:
    async def main() -> None:
        async with running(CountingRunner()) as engine:
            chunks = [chunk async for chunk in engine.generate(request("a", max_tokens=3))]
            assert chunks == [TokenChunk((4,)), TokenChunk((5,)), TokenChunk((6,), FinishReason.LENGTH)]
            stop = GenerationRequest("b", (1,), SamplingParams(max_tokens=50, stop_token_ids=frozenset({4})))
            assert await collect(engine, stop) == ([2, 3, 4], FinishReason.STOP)
            assert idle(engine)

    asyncio.run(main())


def test_greedy_equals_transformers(full_precision: Checkpoint) -> None:
    prompts = [[5, 17, 3], [88], list(range(30)), [1, 1, 1, 2]]
    model = LlamaForCausalLM.from_pretrained(full_precision.path, dtype=torch.float32)
    expected = []
    for ids in prompts:
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(output[0, len(ids) :].tolist())

    async def main() -> None:
        async with running(ReferenceRunner(full_precision)) as engine:
            wanted = [request(f"{i}", ids, 30, temperature=0) for i, ids in enumerate(prompts)]
            found = await asyncio.gather(*(collect(engine, each) for each in wanted))
            assert [tokens for tokens, _ in found] == expected

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{}, {"max_sequences": 3, "token_budget": 5}])
def test_twenty_at_once_equal_one_by_one(quantized: Checkpoint, limits: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    wanted = [
        request(f"{i}", rng.integers(0, 97, rng.integers(1, 40)).tolist(), 20, seed=i, top_p=0.9, temperature=0.8)
        for i in range(20)
    ]

    async def main() -> None:
        async with running(ReferenceRunner(quantized)) as engine:
            alone = [await collect(engine, each) for each in wanted]
        async with running(ReferenceRunner(quantized, num_blocks=20, block_size=8), **limits) as engine:
            together = await asyncio.gather(*(collect(engine, each) for each in wanted))
            assert idle(engine)
        assert together == alone
        assert len({tuple(tokens) for tokens, _ in alone}) == 20

    asyncio.run(main())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("x", ()), "empty"),
        (request("live"), "'live' is running already"),
        (GenerationRequest("x", (1,), SamplingParams(max_tokens=1), n=33), "n is 33; this engine runs 32"),
    ],
    ids=["empty", "live", "many"],
)
def test_a_bad_request_is_refused_and_harms_nobody(wrong: GenerationRequest, message: str) -> None:
    async def main() -> None:
        async with running(CountingRunner()) as engine:
            live = engine.generate(request("live", max_tokens=100))
            await anext(live)
            with pytest.raises(RequestRejectedError, match=message):
                await anext(engine.generate(wrong))
            assert len([chunk async for chunk in live]) == 99
            await engine.check_health()

    asyncio.run(main())


def test_the_stream_of_several_sequences_ends_with_the_last() -> None:
    async def main() -> None:
        async with running(HistoryRunner(64)) as engine:
            # Each child ends at a token of its own accord.
            stops = frozenset(range(4))
            wanted = GenerationRequest("a", (1, 2, 3), SamplingParams(60, seed=1, stop_token_ids=stops), n=4)
            chunks = [chunk async for chunk in engine.generate(wanted)]
            assert idle(engine)
        children = [[chunk for chunk in chunks if chunk.index == index] for index in range(4)]
        assert len({len(child) for child in children}) > 1
        for child in children:
            assert [chunk.finish_reason for chunk in child] == [None] * (len(child) - 1) + [FinishReason.STOP]
            assert child[-1].token_ids[0] in stops

    asyncio.run(main())


def test_the_second_time_a_prompt_is_cached() -> None:
    async def main() -> None:
        async with running(HistoryRunner(64)) as engine:
            for name, cached in (("a", 0), ("b", 8)):
                wanted = request(name, range(10), max_tokens=3, temperature=0)
                chunks = [chunk async for chunk in engine.generate(wanted)]
                assert [chunk.cached_tokens for chunk in chunks] == [cached, 0, 0]
            assert (engine.stats().prefix_cache_queries, engine.stats().prefix_cache_hits) == (20, 8)

    asyncio.run(main())


class WatchedLogits(ArrayLogits):
    """Counts how often its rows are asked for."""

    asked = 0

    def rows(self) -> NDArray[np.float32]:
        WatchedLogits.asked += 1
        return super().rows()


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, 0),
        ({"seed": 5, "top_p": 0.5, "stop_token_ids": frozenset({49})}, 0),
        ({"logprobs": 0}, 5),
        ({"min_tokens": 2}, 0),
    ],
)
def test_plain_greedy_decoding_never_looks_at_the_logits(settings: dict[str, Any], asked: int) -> None:
    async def main() -> None:
        runner = CountingRunner()
        step = runner.step
        runner.step = lambda batch: WatchedLogits(step(batch).rows())  # type: ignore[method-assign]
        WatchedLogits.asked = 0
        async with running(runner) as engine:
            assert (await collect(engine, request("a", temperature=0, **settings)))[0] == [4, 5, 6, 7, 8]
        assert WatchedLogits.asked == asked

    asyncio.run(main())


def test_a_request_larger_than_the_cache_is_refused() -> None:
    async def main() -> None:
        runner = CountingRunner()
        runner.num_blocks = 10
        async with running(runner) as engine:
            with pytest.raises(RequestRejectedError, match="KV cache of 40 positions"):
                await collect(engine, request("x", max_tokens=100))

    asyncio.run(main())


def test_a_full_queue_refuses_until_there_is_room() -> None:
    async def main() -> None:
        limits = {"max_sequences": 1, "max_waiting": 2}
        async with running(CountingRunner(lambda batch: time.sleep(0.002)), **limits) as engine:
            first = asyncio.create_task(collect(engine, request("first", max_tokens=20)))
            await eventually(lambda: engine.stats().running == 1)
            waiting = [asyncio.create_task(collect(engine, request(f"{i}"))) for i in range(2)]
            await eventually(lambda: engine.stats().waiting == 2)
            with pytest.raises(QueueFullError):
                await anext(engine.generate(request("x")))
            await asyncio.gather(first, *waiting)
            assert len((await collect(engine, request("x")))[0]) == 5

    asyncio.run(main())


def test_an_idle_engine_computes_nothing() -> None:
    async def main() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            await collect(engine, request("a", max_tokens=3))
            spent = time.process_time()
            await asyncio.sleep(0.2)
            assert runner.steps == 3
            assert time.process_time() - spent < 0.1

    asyncio.run(main())
