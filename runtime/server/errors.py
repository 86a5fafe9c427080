"""Every error that a client can see, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    GenerationError,
    QueueFullError,
    RequestRejectedError,
)
from runtime.server.request_record import request_record

log = logging.getLogger(__name__)

MAX_SUB_ERRORS = 10
"""Faults that are listed of one request; a body with a million faults gets a short answer too."""

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it."""

RETRY_SOON = {"Retry-After": "1"}
_TYPES = {429: "rate_limit_error"}
_MAX_NAME = 60


class ApiError(Exception):
    """An answer other than 2xx.

    Attributes:
        status: the HTTP status.
        param: the field of the request that is to blame, if one is.
        code: what programs may branch on, OpenAI's where OpenAI has one.
        headers: to be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def reason(self) -> str:
        """The code, or what the status means where there is none; for logs and metrics."""
        if self.status == CLIENT_CLOSED_REQUEST:
            return "client_closed_request"
        return self.code or HTTPStatus(self.status).name.lower()

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        type_ = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        # A name that the client sent may hold half a surrogate pair, which JSON can carry and UTF-8 cannot.
        message = str(self).encode(errors="replace").decode()
        param = self.param and self.param.encode(errors="replace").decode()
        return {"error": {"message": message, "type": type_, "param": param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about `error`; of an error nobody foresaw, only that there was one.

    The request's record notes it, so that logs and metrics tell the same.
    """
    answer = _answer(error)
    request_record().error = answer.reason
    return answer


async def send_error(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request with an error, from outside of the routes."""
    answer = as_api_error(error)
    await JSONResponse(answer.body(), answer.status, answer.headers)(scope, receive, send)


def _answer(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _from_validation(error)
        case HTTPException():
            return ApiError(error.status_code, _routing_message(error), headers=error.headers)
        case QueueFullError():
            return ApiError(503, str(error), code="queue_full", headers=RETRY_SOON)
        case DrainingError():
            return ApiError(503, str(error), code="shutting_down", headers=RETRY_SOON)
        case RequestRejectedError():
            return ApiError(400, str(error), code="request_rejected")
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_dead")
        case GenerationError():
            return ApiError(500, str(error), code="generation_failed")
        case _:
            return ApiError(500, "internal error; the server's log has more", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error through `as_api_error`."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        answer = as_api_error(error)
        return JSONResponse(answer.body(), answer.status, answer.headers)

    foreseen = (ApiError, RequestValidationError, HTTPException, RequestRejectedError, EngineDeadError, GenerationError)
    # What nobody foresaw goes on to the outermost middleware, `runtime.server.middleware`, which logs it.
    for kind in foreseen:
        app.add_exception_handler(kind, handle)


def require_json(request: Request) -> None:
    """A dependency: refuses bodies that are not declared to be JSON. Without it they would be called malformed."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        given = f"is {_cut(content_type)}" if content_type else "is missing"
        raise ApiError(415, f"Content-Type must be application/json, {given}", code="unsupported_media_type")


def _from_validation(error: RequestValidationError) -> ApiError:
    faults = error.errors()
    messages = [_fault_message(fault) for fault in faults[:MAX_SUB_ERRORS]]
    if len(faults) > MAX_SUB_ERRORS:
        messages.append(f"and {len(faults) - MAX_SUB_ERRORS} more")
    return ApiError(400, "; ".join(messages), param=_param(faults[0]))


def _fault_message(fault: Mapping[str, Any]) -> str:
    param = _param(fault)
    match fault["type"]:
        case "json_invalid":
            return f"the body is not valid JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}"
        case "missing":
            return f"{param or 'a JSON body'} is required"
        case "extra_forbidden":
            return f"{param} is not a field of this endpoint"
        case "unsupported":
            return f"{param} {fault['msg']}"
        case _:
            return f"{param or 'the body'} {fault['msg'].removeprefix('Input ')}, is {_cut(fault['input'])}"


def _param(fault: Mapping[str, Any]) -> str | None:
    """Where the fault lies ("stop.2"), without the "body" that FastAPI puts in front."""
    path = [str(part) for part in fault["loc"][1:]] if fault["type"] != "json_invalid" else []
    return ".".join(shortened(part) for part in path) or None


def shortened(name: str) -> str:
    """A name that a client sent, cut to what belongs in a message."""
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


class _ShortRepr(reprlib.Repr):
    """Values that a client sent, as Python writes them, cut to some hundred characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MAX_NAME
        self.maxlist = self.maxdict = 4
        self.maxlevel = 2


_cut = _ShortRepr().repr


def _routing_message(error: HTTPException) -> str:
    """Starlette says "Not Found" and no more."""
    if error.detail == HTTPStatus(error.status_code).phrase:
        return {404: "no such route; the API lives under /v1", 405: "this route has no such method"}.get(
            error.status_code, error.detail
        )
    return error.detail
