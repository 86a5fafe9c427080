"""What both kinds of answers are made of: pieces put together, and tokens counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import chain
from typing import Literal, cast

from runtime.engine.base import FinishReason
from runtime.server.generation import PromptPlan
from runtime.server.schemas.usage import PromptTokensDetails, Usage
from runtime.text.assembler import TextChunk


class TokenCount:
    """The tokens of one request, as they come."""

    def __init__(self, plans: Sequence[PromptPlan]) -> None:
        self._plans = plans
        self._prompt_tokens = [len(plan.request.prompt_token_ids) for plan in plans for _ in range(plan.request.n)]
        self._first_choices = {plan.first_choice for plan in plans}
        self._generated: Counter[int] = Counter()
        self._cached: Counter[int] = Counter()

    def add(self, chunk: TextChunk) -> None:
        """Takes in a piece."""
        self._generated[chunk.index] += len(chunk.token_ids)
        self._cached[chunk.index] += chunk.cached_tokens

    def usage(self) -> Usage:
        """Of the whole request."""
        prompt_tokens = sum(len(plan.request.prompt_token_ids) for plan in self._plans)
        # The other sequences of a prompt tell its cached tokens again.
        cached = sum(self._cached[choice] for choice in self._first_choices)
        return _usage(prompt_tokens, self._generated.total(), cached)

    def usage_of(self, choice: int) -> Usage:
        """Of one choice, so far."""
        return _usage(self._prompt_tokens[choice], self._generated[choice], self._cached[choice])


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


async def collect(chunks: AsyncIterator[TextChunk]) -> list[TextChunk]:
    """The whole of each choice as one piece, by choice."""
    pieces: dict[int, list[TextChunk]] = {}
    async for chunk in chunks:
        pieces.setdefault(chunk.index, []).append(chunk)
    return [_joined(pieces[choice]) for choice in sorted(pieces)]


def _joined(pieces: Sequence[TextChunk]) -> TextChunk:
    first, last = pieces[0], pieces[-1]
    return TextChunk(
        index=first.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        offsets=tuple(chain.from_iterable(piece.offsets for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs or () for piece in pieces)),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=first.cached_tokens,
    )


def finish_reason(chunk: TextChunk) -> Literal["stop", "length"] | None:
    """OpenAI's word for it. An abort never gets here: it is an error."""
    if chunk.finish_reason is None or chunk.finish_reason is FinishReason.ABORT:
        return None
    return cast(Literal["stop", "length"], chunk.finish_reason.value)
