"""`GET /version`."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter

router = APIRouter(tags=["operation"])


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The version of this server."""
    return {"version": version("osp-runtime")}
