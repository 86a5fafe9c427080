"""`GET /openapi.json`: what FastAPI reads off the routes, with the errors and the streams, which it cannot see."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from runtime.server.auth import PROBES
from runtime.server.schemas import ChatCompletionChunk, Completion
from runtime.server.schemas.errors import ErrorBody

_REF = "#/components/schemas/{model}"
_EVENTS: dict[str, type[BaseModel]] = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletionChunk}
_OF_ALL = (400, 401, 413, 431, 500, 503)
_OF_POSTS = (404, 415, 429)
_NAMED = "/v1/models/{name}"


def install_openapi(app: FastAPI, *, keyed: bool) -> None:
    """Makes `app` describe itself with all that can come back; `keyed`: it asks for API keys."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, keyed)
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]  # FastAPI's documented way


def _description(app: FastAPI, keyed: bool) -> dict[str, Any]:
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = description["components"]["schemas"]
    # FastAPI's own answer to a body that is wrong, which is a 400 here.
    del schemas["HTTPValidationError"], schemas["ValidationError"]
    added: tuple[type[BaseModel], ...] = (*_EVENTS.values(), ErrorBody)
    _, definitions = models_json_schema([(model, "serialization") for model in added], ref_template=_REF)
    schemas |= definitions["$defs"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            _describe_answers(operation["responses"], path, posts=method == "post")
            if keyed and path in PROBES:
                operation["security"] = []
    if keyed:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _describe_answers(answers: dict[str, Any], path: str, *, posts: bool) -> None:
    answers.pop("422", None)
    statuses = _OF_ALL + (_OF_POSTS if posts else (404,) if path == _NAMED else ())
    for status in sorted(statuses):
        answers[str(status)] = {"description": HTTPStatus(status).phrase, "content": _content(ErrorBody)}
    if path in _EVENTS:
        answers["200"]["content"]["text/event-stream"] = {"schema": _event(_EVENTS[path])}


def _content(model: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def _event(model: type) -> dict[str, Any]:
    """Each event of a stream: one JSON object as text, and a last one that says that it is over."""
    objects = [{"$ref": _REF.format(model=name)} for name in (model.__name__, ErrorBody.__name__)]
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": objects}}
    data = {"anyOf": [{"const": "[DONE]"}, json_text]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}
