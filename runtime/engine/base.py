"""The contract that the server talks to: `Engine`, and what goes in and comes out.

Engines deal in token ids; text is the job of `runtime.text`. The local engines (reference, native, ONNX Runtime)
share one `LocalEngine`, and so one scheduler, KV block table and sampler, and differ only in their `ModelRunner`.
vLLM brings its own scheduler and implements `Engine` directly.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more; the message says why. The process should be restarted."""


class EngineLostError(EngineDeadError):
    """The engine's own process has ended, and will not come back while this one lives."""


class RequestRejectedError(ValueError):
    """The engine cannot take this request, through no fault of the engine's; the message says why."""


class QueueFullError(RequestRejectedError):
    """As many requests wait as the engine lets wait; the same request may succeed later."""


class DrainingError(RequestRejectedError):
    """The engine is shutting down and takes no new requests."""


class GenerationError(RuntimeError):
    """This one request failed in the engine (NaN logits, say); the engine and the other requests go on."""


class CorruptLogitsError(GenerationError):
    """The model gave NaN or infinite logits for this request."""


MAX_LOGPROBS = 20
"""Most alternatives to a token whose log-probabilities can be asked for."""


class FinishReason(StrEnum):
    """Why a sequence ended. `stop`: an end token (or, in the text layer, a stop string). `length`: `max_tokens`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Guide(Protocol):
    """Narrows each next token to what a grammar, say, allows. Called from the engine's thread."""

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which tokens may follow the generated `token_ids` (without the prompt): bool [V]; None: all of them.

        A function of `token_ids` alone: the children of a request with n > 1 share one guide, and a sequence that was
        put off asks again. What it raises, or a mask of nothing, fails the request and no other.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. What each does, and in which order, is vLLM's; see `runtime.engine.sampler`.

    Attributes:
        max_tokens: most tokens to generate, >= 1; 0 only scores the prompt, with `prompt_logprobs`. Prompt plus
            `max_tokens` must fit the context.
        temperature: >= 0 and finite; 0 is greedy.
        top_k: keep the `top_k` likeliest tokens, and those that tie with the last; 0 keeps all.
        top_p: in (0, 1]; the smallest set of tokens whose probability reaches it is kept.
        min_p: in [0, 1]; keep tokens at least `min_p` times as likely as the likeliest.
        repetition_penalty: > 0; logits of tokens of prompt and output are divided by it if positive, multiplied if not.
        frequency_penalty: in [-2, 2]; taken off a token's logit for each time that it was generated.
        presence_penalty: in [-2, 2]; taken off a token's logit if it was generated.
        logit_bias: by token id, what is added to its logit, in [-100, 100].
        allowed_token_ids: only these may come; None: all.
        banned_token_ids: these may not come.
        guide: narrows the next token further.
        seed: the random stream depends on (seed, child, position) only, so the same request gives the same tokens.
        stop_token_ids: tokens that end the sequence. The token itself is part of the output.
        min_tokens: until so many tokens are generated, `stop_token_ids` may not come.
        logprobs: log-probabilities of each generated token, and of the so many likeliest in its place, 0 to
            `MAX_LOGPROBS`; None: none. They are the model's own, before all of the above.
        prompt_logprobs: the same of the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: frozenset[int] | None = None
    banned_token_ids: frozenset[int] = frozenset()
    guide: Guide | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt, and how to continue it.

    Attributes:
        request_id: unique among live requests.
        n: how many sequences to generate; child i draws from the stream (seed, i, position).
        priority: lower runs first; first come, first served among equals.
        cache_salt: requests share cached prefixes only with those of the same salt.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position.

    Attributes:
        token_id, logprob: the token that stands there.
        rank: 1 plus how many tokens were likelier.
        top: (id, logprob) of the likeliest tokens, likeliest first, the lower id among equals.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Newly generated tokens of one sequence, usually one.

    Attributes:
        finish_reason: set on the sequence's last chunk, which may hold no token.
        index: which of the request's `n` sequences.
        logprobs: one for each of `token_ids`, if they were asked for.
        prompt_logprobs: on the first chunk of sequence 0, if they were asked for: one for each prompt token, None for
            the first of them.
        cached_tokens: on a sequence's first chunk, how many prompt tokens came from the prefix cache.
        queued_s: on a sequence's first chunk, the seconds between submission and the request's first step.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    queued_s: float = field(default=0.0, compare=False)  # a measurement: no part of what was generated


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and serves.

    Attributes:
        engine: as on the command line.
        precision: as `Checkpoint.precision`.
        context_length: tokens of prompt and answer together.
        vocab_size: token ids are below it.
        kernel: what computes the matrix products, by name, for each kind of layer where they may differ; empty where an
            engine has one way only.
    """

    engine: str
    precision: str
    context_length: int
    vocab_size: int
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `/metrics`.

    Attributes:
        running, waiting: sequences.
        kv_usage: the share of KV blocks in use, 0 to 1; blocks that are only remembered for their prefix are free.
        preemptions: how often a sequence was put off for want of KV blocks, since the start.
        prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked up and found, since the start.
    """

    running: int
    waiting: int
    kv_usage: float
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


class Engine(Protocol):
    """What the server needs of an engine. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Called once before the first request; from then on, `info` is whole.

        Raises:
            EngineDeadError: the engine has died meanwhile.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Streams chunks until each of the `n` sequences has had one with a `finish_reason`. Closing it aborts.

        Raises, at the first `__anext__`:
            RequestRejectedError: see `runtime.engine.validation`; or the request exceeds the KV cache, or its
                `request_id` is live already.
            QueueFullError, DrainingError: not now; both are `RequestRejectedError`s.

        Raises, also in the middle of a stream:
            EngineDeadError: the engine has died.
            GenerationError: this request failed; the engine lives on.
        """
        ...

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or its sequence `index`, with `FinishReason.ABORT` within one step; ignores unknown ones."""
        ...

    def stats(self) -> EngineStats: ...

    def observe_steps(self, observer: Callable[[float, int], None]) -> None:
        """Has `observer(seconds, tokens computed)`, and no earlier one, called after each step, from any thread."""
        ...

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine cannot make progress; its live requests have then failed with it."""
        ...

    async def shutdown(self, drain_s: float) -> None:
        """Stops admitting, lets live requests finish for up to `drain_s` seconds, aborts the rest, frees all.

        May be called again, also to shorten a drain that is under way.
        """
        ...
