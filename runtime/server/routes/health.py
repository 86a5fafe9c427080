"""`GET /health` and `GET /ready`, for supervisors and load balancers. They need no API key."""

from __future__ import annotations

from fastapi import APIRouter

from runtime.server.context import RouteContext

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(context: RouteContext) -> dict[str, str]:
    """200 while the process can do its work, or loads or drains; 503 once an engine cannot: then restart it."""
    await context.catalog.check_health()
    return {"status": "ok"}


@router.get("/ready")
async def ready(context: RouteContext) -> dict[str, str]:
    """200 while requests are taken; 503 while models are loaded, while the server drains, and when it is unhealthy."""
    context.catalog.require_serving()
    await context.catalog.check_health()
    return {"status": "ready"}
