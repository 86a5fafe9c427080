"""Requests that no engine can run are refused, with the reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from runtime.engine.base import EngineInfo, GenerationRequest, RequestRejectedError, SamplingParams
from runtime.engine.validation import check_request

INFO = EngineInfo("any", "w4a4", context_length=20, vocab_size=10)
SOUND = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": ()}, "the prompt is empty"),
        ({"prompt_token_ids": (1, 10)}, "the prompt has token id 10, which is outside the vocabulary of 10"),
        ({"prompt_token_ids": (-1,)}, "the prompt has token id -1"),
        ({"prompt_token_ids": (1,) * 16}, "16 prompt tokens and max_tokens of 5 exceed the context of 20 tokens"),
        ({"n": 0}, "n must be at least 1, is 0"),
    ],
)
def test_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestRejectedError, match=message):
        check_request(replace(SOUND, **changes), INFO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, or 0 with prompt_logprobs, is 0"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens must be at least 1"),
        ({"max_tokens": 18}, "exceed the context"),
        ({"min_tokens": 6}, r"min_tokens must lie between 0 and max_tokens \(5\), is 6"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, is -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\], is 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 to keep all tokens, is -1"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, r"min_p must lie in \[0, 1\], is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number > 0, is 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"frequency_penalty": 2.1}, r"frequency_penalty must lie in \[-2, 2\], is 2.1"),
        ({"presence_penalty": math.nan}, r"presence_penalty must lie in \[-2, 2\], is nan"),
        ({"logprobs": 21}, "logprobs must lie between 0 and 20, is 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must lie between 0 and 20, is -1"),
        ({"logit_bias": {10: 1.0}}, "logit_bias has token id 10"),
        ({"logit_bias": {1: -101.0}}, r"logit_bias must lie in \[-100, 100\], is -101.0"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"banned_token_ids": frozenset({-1})}, "banned_token_ids has token id -1"),
        ({"banned_token_ids": frozenset(range(10))}, "banned_token_ids names the whole vocabulary"),
        ({"allowed_token_ids": frozenset({10})}, "allowed_token_ids has token id 10"),
        ({"allowed_token_ids": frozenset()}, "allowed_token_ids has no token that is not banned"),
        (
            {"allowed_token_ids": frozenset({1}), "banned_token_ids": frozenset({1, 2})},
            "allowed_token_ids has no token that is not banned",
        ),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestRejectedError, match=message):
        check_request(replace(SOUND, sampling=replace(SOUND.sampling, **settings)), INFO)


def test_a_scored_prompt_has_one_sequence() -> None:
    scored = replace(SOUND, sampling=SamplingParams(max_tokens=0, prompt_logprobs=0))
    check_request(scored, INFO)
    with pytest.raises(RequestRejectedError, match="n must be 1 where max_tokens is 0, is 2"):
        check_request(replace(scored, n=2), INFO)


def test_what_is_at_the_limits_is_sound() -> None:
    everything = SamplingParams(
        max_tokens=17,
        min_tokens=17,
        temperature=0,
        top_p=1,
        top_k=99,
        min_p=1,
        repetition_penalty=1e-3,
        frequency_penalty=-2,
        presence_penalty=2,
        logit_bias={9: 100.0, 0: -100.0},
        allowed_token_ids=frozenset({1, 2}),
        banned_token_ids=frozenset({1}),
        stop_token_ids=frozenset({5000}),
        logprobs=20,
        prompt_logprobs=20,
        seed=-(2**70),
    )
    check_request(replace(SOUND, sampling=everything, n=100, priority=-7, cache_salt=""), INFO)
