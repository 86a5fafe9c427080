"""A client of an engine without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from runtime.engine.base import Engine, GenerationRequest, SamplingParams, TokenChunk

PROMPT = tuple(range(300, 324))

Result = TypeVar("Result")


class Client:
    """Drives an engine from one event loop, as the server does."""

    def __init__(self, engine: Engine, loop: asyncio.Runner) -> None:
        self.engine = engine
        self._loop = loop
        self._count = 0

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run(work)

    def request(self, prompt: Sequence[int] = PROMPT, n: int = 1, **more: Any) -> GenerationRequest:
        self._count += 1
        names = ("priority", "cache_salt")
        sampling = SamplingParams(**{name: value for name, value in more.items() if name not in names})
        rest = {name: more[name] for name in names if name in more}
        return GenerationRequest(f"test-{self._count}", tuple(prompt), sampling, n, **rest)

    async def collect(self, request: GenerationRequest) -> list[TokenChunk]:
        return [chunk async for chunk in self.engine.generate(request)]

    def chunks(self, *arguments: Any, **named: Any) -> list[TokenChunk]:
        return self.run(self.collect(self.request(*arguments, **named)))

    def tokens(self, *arguments: Any, **named: Any) -> list[list[int]]:
        """Of each sequence."""
        chunks = self.chunks(*arguments, **named)
        return [[t for c in chunks if c.index == i for t in c.token_ids] for i in range(named.get("n", 1))]
