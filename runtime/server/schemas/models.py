"""What clients are told about models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """A served model. The fields after `owned_by` are extensions; the first of them is vLLM's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "osp-runtime"
    max_model_len: int = Field(description="The context: most tokens of prompt and completion together.")
    engine: str
    precision: str
    scheme: dict[str, Any] | None = Field(description="What is quantized and how; null at full precision.")
    quality: dict[str, Any] | None = Field(description="What was measured when the checkpoint was made.")
    chat: bool = Field(description="Whether it has a chat template, and so answers conversations.")


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
