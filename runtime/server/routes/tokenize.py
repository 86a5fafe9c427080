"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from runtime.server.chat_prompt import encode_chat, template_variables
from runtime.server.context import RouteContext
from runtime.server.errors import require_json
from runtime.server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from runtime.server.tokenization import check_ids, encode_text, spelled

router = APIRouter(tags=["tokens"], dependencies=[Depends(require_json)])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, context: RouteContext) -> TokenizeResponse:
    """The token ids of a text, or of a conversation through the model's chat template."""
    model = context.catalog.pick(body.model)
    if body.messages is not None:
        token_ids = await encode_chat(body.messages, body, model, template_variables(body.tools, body))
    else:
        token_ids = await encode_text(body.prompt or "", model, add_special_tokens=body.add_special_tokens is not False)
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=model.engine.info.context_length,
        tokens=list(token_ids),
        token_strs=model.tokenizer.vocabulary_entries(token_ids) if body.return_token_strs else None,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: RouteContext) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    model = context.catalog.pick(body.model)
    check_ids(body.tokens, model, "tokens")
    text, _ = spelled(model.tokenizer, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
