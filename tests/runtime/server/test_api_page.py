"""docs/api.md names every field of every request, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from runtime.server.schemas import ChatRequest, CompletionRequest
from runtime.server.schemas.generation import GenerationBody, StreamOptions
from runtime.server.schemas.structured import StructuredOutputs
from runtime.server.schemas.tokens import DetokenizeRequest, TokenizeRequest

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def rows(heading: str) -> set[str]:
    """The fields in the first column of the table below a heading."""
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    columns = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for column in columns for name in re.findall(r"`([a-z_.]+)`", column)}


def fields(*models: type[BaseModel]) -> set[str]:
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def test_fields_of_both() -> None:
    shared = fields(GenerationBody) | {"add_special_tokens"}
    options = {f"stream_options.{name}" for name in fields(StreamOptions)}
    assert rows("Fields of both kinds of completion") == shared - {"stream_options"} | options


@pytest.mark.parametrize(
    ("heading", "model"), [("`/v1/completions`", CompletionRequest), ("`/v1/chat/completions`", ChatRequest)]
)
def test_fields_of_one(heading: str, model: type[BaseModel]) -> None:
    assert rows(heading) == fields(model) - fields(GenerationBody) - {"add_special_tokens"}


def test_what_stands_in_text() -> None:
    for name in fields(StructuredOutputs, TokenizeRequest, DetokenizeRequest):
        assert f"`{name}`" in PAGE
