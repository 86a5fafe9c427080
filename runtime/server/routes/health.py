"""`GET /health` and `GET /version`, for operators."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter

from runtime.server.context import RouteContext

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(context: RouteContext) -> dict[str, str]:
    """200 while every engine can make progress, 503 once one cannot: then restart the process."""
    await context.catalog.check_health()
    return {"status": "ok"}


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The version of this server."""
    return {"version": version("osp-runtime")}
