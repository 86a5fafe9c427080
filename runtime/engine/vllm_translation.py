"""Between the `Engine` protocol and vLLM: requests on their way in, tokens on their way out.

What vLLM would do otherwise than the protocol says is refused here, and never done silently; docs/vllm.md lists it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from runtime.engine.base import (
    CorruptLogitsError,
    FinishReason,
    GenerationError,
    GenerationRequest,
    Guide,
    RequestRejectedError,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
)
from runtime.text.grammar import Grammar

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""What vLLM samples at; it raises a lower temperature to the first without a word, and refuses one above the second."""

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


def sampling_params(request: GenerationRequest, index: int) -> Any:
    """vLLM's `SamplingParams` of sequence `index`, which is a request of its own there.

    Raises:
        RequestRejectedError: vLLM cannot sample so.
    """
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    sampling = request.sampling
    if sampling.temperature and not MIN_TEMPERATURE <= sampling.temperature <= MAX_TEMPERATURE:
        raise RequestRejectedError(
            f"temperature must be 0, or lie in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}] with the engine vllm, "
            f"is {sampling.temperature}"
        )
    guide = None if sampling.guide is None else StructuredOutputsParams(grammar=lark(sampling.guide))
    allowed, bias = _single_tokens(sampling)
    return VllmSamplingParams(
        max_tokens=max(1, sampling.max_tokens),  # of a prompt that is only scored, the token is dropped
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=bias or None,
        allowed_token_ids=allowed,
        structured_outputs=guide,
        seed=child_seed(sampling.seed, index),
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=True,  # the tokens that end a text are among the stop tokens, if they are to end it
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def child_seed(seed: int, index: int) -> int:
    """vLLM's seed, 63 bits, of sequence `index`: streams of different (seed, index) have nothing in common."""
    return int(np.random.SeedSequence((seed % 2**64, index)).generate_state(1, np.uint64)[0] >> 1)


def lark(guide: Guide) -> str:
    """A guide's grammar in Lark's syntax, the one form in which vLLM hands everything to llguidance as it is.

    Raises:
        RequestRejectedError: the guide is no `Grammar`, and vLLM's processes cannot call it.
    """
    if not isinstance(guide, Grammar):
        raise RequestRejectedError(f"the engine vllm takes grammars as guides, and no {type(guide).__name__}")
    if not guide.text.startswith("{"):
        return guide.text
    parts = json.loads(guide.text)["grammars"]
    if len(parts) != 1:
        raise RequestRejectedError("the engine vllm takes no grammar of several parts")
    schema = parts[0]["json_schema"]
    return str(parts[0]["lark_grammar"]) if schema is None else f"start: %json {json.dumps(schema)}"


def _single_tokens(sampling: SamplingParams) -> tuple[list[int] | None, dict[int, float]]:
    """The tokens that alone may come, None for all, and what is added to logits: minus infinity to a banned one."""
    if sampling.allowed_token_ids is not None:
        return sorted(sampling.allowed_token_ids - sampling.banned_token_ids), dict(sampling.logit_bias)
    return None, {**sampling.logit_bias, **dict.fromkeys(sampling.banned_token_ids, -math.inf)}


class SequenceReader:
    """Makes chunks of what vLLM says of one sequence."""

    def __init__(self, request: GenerationRequest, index: int) -> None:
        self._sampling = request.sampling
        self._index = index
        self._generated = 0

    def read(self, output: Any) -> list[TokenChunk]:
        """A `RequestOutput` with the news since the last one, a chunk for each token.

        vLLM hands several tokens over at once where the server was busy meanwhile. How tokens are gathered for clients
        is the `Mailroom`'s to say.

        Raises:
            GenerationError: the request has failed in vLLM, or left no token that could have come.
        """
        sampling, completion = self._sampling, output.outputs[0]
        if output.metrics is not None and output.metrics.is_corrupted:
            raise CorruptLogitsError(f"a logit is NaN at one of the {len(completion.token_ids)} latest tokens")
        first = self._generated == 0
        token_ids, logprobs = tuple(completion.token_ids), completion.logprobs
        finish = None if completion.finish_reason is None else _finish(completion.finish_reason)
        if sampling.max_tokens == 0 and token_ids:
            token_ids, logprobs, finish = (), None, FinishReason.LENGTH
        self._check(token_ids)
        self._generated += len(token_ids)
        chunk = TokenChunk(
            token_ids,
            finish,
            self._index,
            None if sampling.logprobs is None else _each(token_ids, logprobs, sampling.logprobs),
            None if sampling.prompt_logprobs is None else _prompt(output, sampling.prompt_logprobs),
            (output.num_cached_tokens or 0) if first else 0,
            max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts) if first and output.metrics else 0.0,
        )
        return _a_token_each(chunk)

    def _check(self, token_ids: tuple[int, ...]) -> None:
        """Where everything is excluded, vLLM's sampler draws from nothing, and finds something all the same."""
        sampling = self._sampling
        for position, token in enumerate(token_ids, self._generated):
            foreign = sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids
            early = position < sampling.min_tokens and token in sampling.stop_token_ids
            if foreign or early or token in sampling.banned_token_ids:
                raise GenerationError(f"no token may come as number {position + 1}: the request excludes all of them")


def _a_token_each(chunk: TokenChunk) -> list[TokenChunk]:
    if len(chunk.token_ids) < 2:
        return [chunk]
    pieces = [
        TokenChunk((token,), index=chunk.index, logprobs=None if chunk.logprobs is None else chunk.logprobs[i : i + 1])
        for i, token in enumerate(chunk.token_ids)
    ]
    pieces[0] = replace(chunk, token_ids=pieces[0].token_ids, logprobs=pieces[0].logprobs, finish_reason=None)
    pieces[-1] = replace(pieces[-1], finish_reason=chunk.finish_reason)
    return pieces


def _finish(reason: str) -> FinishReason:
    if reason not in _FINISH:
        raise GenerationError(f"vLLM has ended the request with {reason!r}")
    return _FINISH[reason]


def _each(token_ids: tuple[int, ...], logprobs: Any, count: int) -> tuple[TokenLogprobs, ...]:
    return tuple(_logprobs(token, found, count) for token, found in zip(token_ids, logprobs or (), strict=True))


def _prompt(output: Any, count: int) -> tuple[TokenLogprobs | None, ...] | None:
    if not output.prompt_logprobs:
        return None
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return tuple(None if found is None else _logprobs(token, found, count) for token, found in pairs)


def _logprobs(token_id: int, found: Mapping[int, Any], count: int) -> TokenLogprobs:
    """From vLLM's dict by token: of the `count` likeliest tokens, and of the one that stands there if it is not one."""
    own = found[token_id]
    top = [(token, entry.logprob) for token, entry in found.items() if token != token_id or len(found) <= count]
    top.sort(key=lambda pair: (-pair[1], pair[0]))
    # vLLM counts equals as likelier. Among the likeliest tokens all that are likelier are known.
    rank = 1 + sum(logprob > own.logprob for _, logprob in top) if len(found) <= count else own.rank
    return TokenLogprobs(token_id, own.logprob, rank, tuple(top))
