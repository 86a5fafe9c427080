"""From a conversation to the tokens of a prompt, through the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.schemas.chat import ConversationOptions
from runtime.server.schemas.messages import Message, Tool
from runtime.server.tokenization import in_thread
from runtime.text.chat_template import ChatTemplate, ChatTemplateError
from runtime.text.typed_tokens import TypedTokens

_compiled = lru_cache(maxsize=32)(ChatTemplate)

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


async def encode_chat(
    messages: Sequence[Message], options: ConversationOptions, model: ServedModel, variables: Mapping[str, Any]
) -> tuple[int, ...]:
    """The token ids of a conversation. Special tokens are the template's; those that a client typed are text.

    Args:
        variables: more of them for the template, from other fields of the request.

    Raises:
        ApiError: 400, the model has no template, or its template does not take this conversation.
    """
    source = model.chat_template(tools=variables.get("tools") is not None)
    if source is None:
        message = (
            f"the model {model.name!r} has no chat template, so it takes no messages; start the server with "
            "--chat-template, or use /v1/completions"
        )
        raise ApiError(400, message, param="messages", code="no_chat_template")
    foreign = sorted(_OWN_VARIABLES & options.chat_template_kwargs.keys())
    if foreign:
        message = f"chat_template_kwargs must not hold {foreign[0]}, which is a field of the request"
        raise ApiError(400, message, param="chat_template_kwargs")
    try:
        template = _compiled(source)
        return await in_thread(lambda: _encode(messages, options, model, template, variables), "messages")
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
    except RecursionError:
        raise ApiError(400, "messages or tools are nested too deep", param="messages") from None


def _encode(
    messages: Sequence[Message],
    options: ConversationOptions,
    model: ServedModel,
    template: ChatTemplate,
    variables: Mapping[str, Any],
) -> tuple[int, ...]:
    tokenizer, typed = model.tokenizer, TypedTokens(model.tokenizer)
    opened = options.continue_final_message
    text = template.render(
        # A role is one of a few words, and templates may make tokens of it.
        [{**typed.hide(message.model_dump(exclude_unset=True)), "role": message.role} for message in messages],
        add_generation_prompt=not opened if options.add_generation_prompt is None else options.add_generation_prompt,
        continue_final_message=opened,
        **tokenizer.named_tokens | typed.hide({**variables, **options.chat_template_kwargs}),
    )
    token_ids, front = typed.encode(text), tokenizer.added_in_front
    if not options.add_special_tokens or token_ids[: len(front)] == front:
        return token_ids  # one BOS is enough
    return front + token_ids


def template_variables(tools: Sequence[Tool] | None, options: ConversationOptions) -> dict[str, Any]:
    """What templates expect beside the messages."""
    shown = None if tools is None else [tool.model_dump(exclude_unset=True) for tool in tools]
    return {"tools": shown, "documents": options.documents}
