"""`GET /v1/models`, and one model by its name."""

from __future__ import annotations

from fastapi import APIRouter

from runtime.server.context import RouteContext
from runtime.server.schemas import ModelCard, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(context: RouteContext) -> ModelList:
    """All models that a request may name; the first is the one that answers where none is named."""
    context.catalog.require_serving()
    return ModelList(data=[model.card for model in context.catalog])


# A path, because a model can be called owner/name.
@router.get("/{name:path}")
async def get_model(name: str, context: RouteContext) -> ModelCard:
    """One model: its context, engine, precision, scheme and recorded quality."""
    return context.catalog.pick(name).card
