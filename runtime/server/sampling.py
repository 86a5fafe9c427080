"""From the fields of a request to what engine and text layer are told."""

from __future__ import annotations

from runtime.engine.base import Guide, SamplingParams
from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.schemas.generation import GenerationBody
from runtime.server.tokenization import check_ids
from runtime.text.assembler import TextOptions


def sampling_params(
    body: GenerationBody,
    model: ServedModel,
    *,
    max_tokens: int,
    seed: int,
    guide: Guide | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        ApiError: 400, a token is not of the vocabulary, or `min_tokens` is more than `max_tokens`.
    """
    bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    check_ids(bias, model, "logit_bias")
    check_ids(body.stop_token_ids, model, "stop_token_ids")
    check_ids(body.allowed_token_ids or (), model, "allowed_token_ids")
    if body.min_tokens > max_tokens:
        message = f"min_tokens is {body.min_tokens}; it may not be more than the {max_tokens} tokens that may come"
        raise ApiError(400, message, param="min_tokens")
    text = text_options(body, model)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=seed,
        stop_token_ids=text.end_token_ids | text.stop_token_ids,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=bias,
        allowed_token_ids=None if body.allowed_token_ids is None else frozenset(body.allowed_token_ids),
        guide=guide,
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def text_options(body: GenerationBody, model: ServedModel) -> TextOptions:
    """How text is made of the tokens, and where it ends."""
    return TextOptions(
        stops=body.stops(),
        stop_token_ids=frozenset(body.stop_token_ids),
        end_token_ids=frozenset() if body.ignore_eos else model.tokenizer.end_token_ids,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
    )
