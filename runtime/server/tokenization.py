"""Prompts to token ids, checked; and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Literal

from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError, shortened
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer


async def encode_text(text: str, model: ServedModel, *, add_special_tokens: bool) -> tuple[int, ...]:
    """The token ids of a prompt, in which special tokens are text.

    Raises:
        ApiError: 400, it is no text.
    """
    return await in_thread(lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens), "prompt")


async def in_thread(encode: Callable[[], tuple[int, ...]], param: str) -> tuple[int, ...]:
    """Token ids, found in a thread: a long text takes its time, and the other clients' tokens must not wait for it.

    Raises:
        ApiError: 400, the text is none.
    """
    try:
        return await asyncio.to_thread(encode)
    except UnicodeEncodeError:
        message = f"{param} holds half of a surrogate pair, which is no character"
        raise ApiError(400, message, param=param) from None


def check_ids(token_ids: Collection[int], model: ServedModel, param: str) -> None:
    """Raises `ApiError` 400 where an id is not of the model's vocabulary."""
    vocabulary = model.engine.info.vocab_size
    foreign = next((id for id in token_ids if not 0 <= id < vocabulary), None)
    if foreign is not None:
        message = f"{param} holds the token id {shortened(str(foreign))}; this model's ids are 0 to {vocabulary - 1}"
        raise ApiError(400, message, param=param)


def truncate(
    token_ids: tuple[int, ...], keep: int | None, side: Literal["left", "right"], room: int
) -> tuple[int, ...]:
    """The last `keep` tokens, or with `side` "right" the first ones; for -1, as many as there is room for."""
    if keep is None:
        return token_ids
    count = max(0, room) if keep == -1 else keep
    if len(token_ids) <= count:
        return token_ids
    return token_ids[len(token_ids) - count :] if side == "left" else token_ids[:count]


def check_length(prompt_tokens: int, max_tokens: int, model: ServedModel, *, params: tuple[str, str]) -> None:
    """Refuses what the context cannot hold.

    Args:
        params: the fields of the request that the prompt and `max_tokens` come from.

    Raises:
        ApiError: 400, the prompt is empty, or too long together with `max_tokens`.
    """
    context = model.engine.info.context_length
    if prompt_tokens == 0:
        raise ApiError(400, f"{params[0]} is empty, and no special token is put in front of it", param=params[0])
    if prompt_tokens + max_tokens > context:
        raise ApiError(
            400,
            f"this model's context is {context} tokens; {params[0]} has {prompt_tokens} and {params[1]} asks for "
            f"{max_tokens} more",
            param=params[1] if prompt_tokens < context else params[0],
            code="context_length_exceeded",
        )


def spelled(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool, begins_text: bool = True
) -> tuple[str, tuple[int, ...]]:
    """The text of tokens, and where in it each of them begins, in characters.

    A token that begins within a character begins where that character does.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, begins_text=begins_text)
    pieces = [detokenizer.push(id) for id in token_ids]
    offsets = tuple(accumulate(map(len, pieces), initial=0))[: len(pieces)]
    return "".join(pieces) + detokenizer.flush(), offsets
