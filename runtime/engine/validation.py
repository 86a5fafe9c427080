"""Whether an engine can run a request at all, apart from how busy it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from runtime.engine.base import MAX_LOGPROBS, EngineInfo, GenerationRequest, RequestRejectedError, SamplingParams


def check_request(request: GenerationRequest, info: EngineInfo) -> None:
    """Raises `RequestRejectedError`, saying what is wrong, unless an engine such as `info` can run the request."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise RequestRejectedError("the prompt is empty; it needs at least one token")
    _check_ids("the prompt", prompt, info.vocab_size)
    if len(prompt) + sampling.max_tokens > info.context_length:
        raise RequestRejectedError(
            f"{len(prompt)} prompt tokens and max_tokens of {sampling.max_tokens} exceed the context of "
            f"{info.context_length} tokens"
        )
    if request.n < 1:
        raise RequestRejectedError(f"n must be at least 1, is {request.n}")
    _check_lengths(sampling, request.n)
    _check_numbers(sampling)
    _check_tokens(sampling, info.vocab_size)


def _check_lengths(sampling: SamplingParams, n: int) -> None:
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is not None:
        if n > 1:
            raise RequestRejectedError(f"n must be 1 where max_tokens is 0, is {n}")
    elif sampling.max_tokens < 1:
        raise RequestRejectedError(
            f"max_tokens must be at least 1, or 0 with prompt_logprobs, is {sampling.max_tokens}"
        )
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise RequestRejectedError(
            f"min_tokens must lie between 0 and max_tokens ({sampling.max_tokens}), is {sampling.min_tokens}"
        )


def _check_numbers(sampling: SamplingParams) -> None:
    # Written so that NaN fails too.
    if not 0 <= sampling.temperature < math.inf:
        raise RequestRejectedError(f"temperature must be a finite number >= 0, is {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise RequestRejectedError(f"top_p must lie in (0, 1], is {sampling.top_p}")
    if sampling.top_k < 0:
        raise RequestRejectedError(f"top_k must be at least 1, or 0 to keep all tokens, is {sampling.top_k}")
    if not 0 <= sampling.min_p <= 1:
        raise RequestRejectedError(f"min_p must lie in [0, 1], is {sampling.min_p}")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise RequestRejectedError(f"repetition_penalty must be a finite number > 0, is {sampling.repetition_penalty}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(sampling, name) <= 2:
            raise RequestRejectedError(f"{name} must lie in [-2, 2], is {getattr(sampling, name)}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, name)
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise RequestRejectedError(f"{name} must lie between 0 and {MAX_LOGPROBS}, is {count}")


def _check_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    _check_ids("banned_token_ids", sampling.banned_token_ids, vocab_size)
    unfit = next((bias for bias in sampling.logit_bias.values() if not -100 <= bias <= 100), None)
    if unfit is not None:
        raise RequestRejectedError(f"logit_bias must lie in [-100, 100], is {unfit} for a token")
    if sampling.allowed_token_ids is not None:
        _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
        if sampling.allowed_token_ids <= sampling.banned_token_ids:
            raise RequestRejectedError("allowed_token_ids has no token that is not banned; no token could come")
    if len(sampling.banned_token_ids) == vocab_size:
        raise RequestRejectedError("banned_token_ids names the whole vocabulary; no token could come")


def _check_ids(where: str, token_ids: Iterable[int], vocab_size: int) -> None:
    foreign = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if foreign is not None:
        raise RequestRejectedError(f"{where} has token id {foreign}, which is outside the vocabulary of {vocab_size}")
