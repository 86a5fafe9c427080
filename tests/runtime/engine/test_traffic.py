"""Ten thousand requests of all kinds through one LocalEngine: right tokens, no lost block, no growing memory."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
from collections import Counter

from history_runner import HistoryRunner, greedy_continuation

from runtime.engine.base import EngineStats, FinishReason, GenerationRequest, SamplingParams
from runtime.engine.local import LocalEngine
from runtime.engine.scheduler import SchedulerLimits

REQUESTS = 10_000
CLIENTS = 24
BEGINNINGS = [tuple(random.Random(i).choices(range(32), k=12)) for i in range(20)]


class Client:
    """Sends one request after the other, and does with each what clients do."""

    def __init__(self, engine: LocalEngine, number: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._engine = engine
        self._number = number
        self._random = random.Random(number)

    async def send(self, count: int) -> None:
        for _ in range(count):
            way = self._random.choices(("finish", "abort", "abort one", "close", "cancel"), (6, 1, 1, 1, 1))[0]
            self.outcomes[way] += 1
            request = self._request()
            if way == "cancel":
                task = asyncio.create_task(self._listen(request, 10**9, way))
                for _ in range(self._random.randint(0, 6)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
            else:
                await self._listen(request, self._random.randint(1, 5), way)

    def _request(self) -> GenerationRequest:
        choose = self._random
        self.outcomes["sent"] += 1
        sampling = SamplingParams(
            max_tokens=choose.randint(1, 8),
            temperature=choose.choice((0, 0, 0, 1)),
            logprobs=choose.choice((None, None, None, 1)),
            prompt_logprobs=choose.choice((None, None, None, None, None, 0)),
        )
        prompt = choose.choice(BEGINNINGS)[: choose.randint(0, 12)] + tuple(choose.choices(range(32), k=3))
        name = f"{self._number}-{self.outcomes['sent']}"
        return GenerationRequest(name, prompt, sampling, choose.choice((1, 1, 1, 2, 3)), choose.randint(-1, 1))

    async def _listen(self, request: GenerationRequest, patience: int, way: str) -> None:
        heard: dict[int, list[int]] = {index: [] for index in range(request.n)}
        stream = self._engine.generate(request)
        try:
            async for chunk in stream:
                heard[chunk.index] += chunk.token_ids
                self.outcomes[f"{chunk.finish_reason}"] += 1
                patience -= 1
                if patience == 0 and way == "abort":
                    await self._engine.abort(request.request_id)
                elif patience == 0 and way == "abort one":
                    await self._engine.abort(request.request_id, request.n - 1)
                elif patience == 0 and way == "close":
                    break
        finally:
            await stream.aclose()
        if request.sampling.temperature == 0:
            expected = greedy_continuation(request.prompt_token_ids, request.sampling.max_tokens)
            for tokens in heard.values():
                assert tokens == expected[: len(tokens)]
                assert way != "finish" or tokens == expected


def test_ten_thousand_requests() -> None:
    runner = HistoryRunner(num_blocks=20, block_size=4)

    async def main() -> tuple[EngineStats, Counter[str]]:
        engine = LocalEngine(runner, SchedulerLimits(max_sequences=8, token_budget=24))
        clients = [Client(engine, number) for number in range(CLIENTS)]
        allocated = []
        for part in (0.3, 0.4, 0.3):
            await asyncio.gather(*(client.send(int(REQUESTS * part / CLIENTS) + 1) for client in clients))
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
            runner.batches.clear()
            gc.collect()
            allocated.append(sys.getallocatedblocks())
        # One more that needs every block there is.
        whole = GenerationRequest("whole", (1,) * 72, SamplingParams(9, temperature=0))
        assert len([chunk async for chunk in engine.generate(whole)]) == 9
        await engine.shutdown(0)
        # Seven thousand requests later there is not one object more for every ten of them.
        assert max(allocated) - allocated[0] < 700
        return stats, sum((client.outcomes for client in clients), Counter())

    stats, outcomes = asyncio.run(main())
    assert outcomes["sent"] >= REQUESTS
    assert stats.preemptions > 100
    assert stats.prefix_cache_hits > 1000
    assert runner.copied > 100
    assert min(outcomes[f"{reason}"] for reason in (FinishReason.ABORT, FinishReason.LENGTH)) > 500
    assert min(outcomes[way] for way in ("finish", "abort", "abort one", "close", "cancel")) > 500
