"""The two contracts of this package: `Engine`, which the server talks to, and `ModelRunner`, which computes logits.

Engines deal in token ids; text is the job of `runtime.text`. The local engines (reference, native, ONNX Runtime)
share one `LocalEngine`, and so one scheduler, KV block table and sampler, and differ only in their `ModelRunner`.
vLLM brings its own scheduler and implements `Engine` directly.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more; the message says why. The process should be restarted."""


class RequestRejectedError(ValueError):
    """The engine cannot take this request, through no fault of the engine's; the message says why."""


class QueueFullError(RequestRejectedError):
    """As many requests wait as the engine lets wait; the same request may succeed later."""


class DrainingError(RequestRejectedError):
    """The engine is shutting down and takes no new requests."""


class GenerationError(RuntimeError):
    """This one request failed in the engine (NaN logits, say); the engine and the other requests go on."""


class FinishReason(StrEnum):
    """Why a sequence ended. `stop`: an end token (or, in the text layer, a stop string). `length`: `max_tokens`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens.

    Attributes:
        max_tokens: most tokens to generate, >= 1. Prompt plus `max_tokens` must fit the context.
        temperature: >= 0 and finite; 0 is greedy.
        top_p: in (0, 1]; the smallest set of tokens whose probability reaches it is kept.
        seed: the random stream depends on (seed, position) only, so the same request gives the same tokens.
        stop_token_ids: tokens that end the sequence. The token itself is part of the output.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. `request_id` is unique among live requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Newly generated tokens, usually one. `finish_reason` is set on the last chunk, which may hold no token."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and serves: `engine` as on the command line, `precision` as `Checkpoint.precision`."""

    engine: str
    precision: str
    context_length: int
    vocab_size: int


def check_request(request: GenerationRequest, info: EngineInfo) -> None:
    """Raises `RequestRejectedError`, saying what is wrong, unless an engine such as `info` can run the request."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise RequestRejectedError("the prompt is empty; it needs at least one token")
    foreign = next((token for token in prompt if not 0 <= token < info.vocab_size), None)
    if foreign is not None:
        raise RequestRejectedError(f"token id {foreign} is outside the vocabulary of {info.vocab_size}")
    if sampling.max_tokens < 1:
        raise RequestRejectedError(f"max_tokens must be at least 1, is {sampling.max_tokens}")
    if len(prompt) + sampling.max_tokens > info.context_length:
        raise RequestRejectedError(
            f"{len(prompt)} prompt tokens and max_tokens of {sampling.max_tokens} exceed the context of "
            f"{info.context_length} tokens"
        )
    # Written so that NaN fails too.
    if not 0 <= sampling.temperature < math.inf:
        raise RequestRejectedError(f"temperature must be a finite number >= 0, is {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise RequestRejectedError(f"top_p must lie in (0, 1], is {sampling.top_p}")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `/metrics`. `kv_usage` is the share of KV blocks in use, 0 to 1."""

    running: int
    waiting: int
    kv_usage: float


class Engine(Protocol):
    """What the server needs of an engine. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Streams chunks until one has a `finish_reason`. Closing the iterator aborts the request.

        Raises, at the first `__anext__`:
            RequestRejectedError: prompt plus `max_tokens` exceed the context or the KV cache, an id is outside the
                vocabulary, an empty prompt, a setting out of range, a `request_id` that is live already.
            QueueFullError, DrainingError: not now; both are `RequestRejectedError`s.

        Raises, also in the middle of a stream:
            EngineDeadError: the engine has died.
            GenerationError: this request failed; the engine lives on.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request with `FinishReason.ABORT` within one step; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats: ...

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine cannot make progress."""
        ...

    async def shutdown(self, drain_s: float) -> None:
        """Stops admitting, lets live requests finish for up to `drain_s` seconds, aborts the rest, frees all.

        May be called again, also to shorten a drain that is under way.
        """
        ...


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """A run of consecutive tokens of one sequence, to be computed in one step.

    Attributes:
        token_ids: int32 [L], L >= 1.
        start: position of `token_ids[0]`. The keys and values of positions 0 … start-1 are in the cache.
        block_table: int32 [blocks]; position p lives in block `block_table[p // block_size]`, row `p % block_size`.
            Covers at least the positions 0 … start+L-1.
        num_logits: logits are wanted for this many of the last tokens: 0 for a prefill chunk that is not the
            last, 1 to sample the next token, L to score a prompt.
    """

    token_ids: NDArray[np.int32]
    start: int
    block_table: NDArray[np.int32]
    num_logits: int = 1


class ModelRunner(Protocol):
    """Computes logits over a paged KV cache that it owns. Not thread-safe: one caller at a time.

    A row of logits depends on its own sequence's tokens only: bit for bit the same alone, in any batch and for
    any cutting of its tokens into slices.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def block_size(self) -> int:
        """Positions in a KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks in the cache; block ids are 0 … num_blocks-1."""
        ...

    def step(self, batch: Sequence[SequenceSlice]) -> NDArray[np.float32]:
        """Writes the slices' keys and values, returns logits float32 [sum of num_logits, V], in batch order."""
        ...
