"""What every answer other than 2xx looks like: OpenAI's shape."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field of the request that is to blame, if one is.")
    code: str | None = Field(description="What programs may branch on.")


class ErrorBody(BaseModel):
    """The body of an error, or an event of a stream that has failed midway."""

    error: Fault
