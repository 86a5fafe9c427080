"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from runtime.server.chat import complete_chat, plan_chat, stream_chat, unasked_fields
from runtime.server.context import RouteContext
from runtime.server.errors import require_json
from runtime.server.schemas import ChatCompletion, ChatRequest
from runtime.server.streaming import open_event_stream, unless_disconnected

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post("/chat/completions", response_model=ChatCompletion, dependencies=[Depends(require_json)])
async def create_chat_completion(body: ChatRequest, request: Request, context: RouteContext) -> Response:
    """Answers a conversation; as one answer, or as server-sent events with `stream`."""
    model = context.catalog.pick(body.model)
    limit = context.settings.prompt_limit
    plan = await plan_chat(body, model, max_choices=limit, arrival=request.state.arrival)
    if body.stream:
        return await open_event_stream(request, stream_chat(plan))
    answer = await unless_disconnected(request.receive, complete_chat(plan))
    return JSONResponse(answer.model_dump(exclude=unasked_fields(body)))
