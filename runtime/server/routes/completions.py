"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from runtime.server.completion import complete, plan_completion, stream, unasked_fields
from runtime.server.context import RouteContext
from runtime.server.errors import require_json
from runtime.server.schemas import Completion, CompletionRequest
from runtime.server.streaming import open_event_stream, unless_disconnected

router = APIRouter(prefix="/v1", tags=["completions"])


@router.post("/completions", response_model=Completion, dependencies=[Depends(require_json)])
async def create_completion(body: CompletionRequest, request: Request, context: RouteContext) -> Response:
    """Continues one or several prompts; as one answer, or as server-sent events with `stream`."""
    model = context.catalog.pick(body.model)
    limit = context.settings.prompt_limit
    plan = await plan_completion(body, model, max_choices=limit, arrival=request.state.arrival)
    if body.stream:
        return await open_event_stream(request, stream(plan))
    completion = await unless_disconnected(request.receive, complete(plan))
    return JSONResponse(completion.model_dump(exclude=unasked_fields(body)))
