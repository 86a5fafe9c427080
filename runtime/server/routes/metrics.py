"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from runtime.server.context import RouteContext

router = APIRouter(tags=["operation"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: RouteContext) -> Response:
    """All metrics in Prometheus's text format."""
    return Response(context.telemetry.exposition(), media_type=CONTENT_TYPE_LATEST)
