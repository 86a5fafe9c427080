"""What is known of the HTTP request that is being answered: for the access log, the metrics, the limits and the spans.

The record travels in a context variable: whatever works for a request, in whichever of its tasks, finds it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from runtime.engine.base import SamplingParams


@dataclass(slots=True)
class RequestRecord:
    """One request, from its arrival to its end.

    Attributes:
        id: the client's `X-Request-Id`, if it sent a fit one, or a new one.
        client: its address, without the port.
        traceparent: of W3C Trace Context, as the client sent it.
        arrival: by `time.perf_counter`; `arrived_ns` the same by the clock of `time.time_ns`.
        route: the path of the route that answers it ("/v1/models/{name}"); None where there is none.
        status: the HTTP status; None before the answer has begun.
        error: the code of the error that it was answered with, also in the middle of a stream.
        key_name: the name of its API key.
        model: the model that it was answered by.
        sampling: how that chose tokens.
        prompt_tokens, cached_tokens, completion_tokens: over all of its sequences, so far.
        first_token_s: seconds from arrival to its first token.
        finish_reasons: of its sequences, as they ended.
        body: as it came, where prompts may be logged.
        charge: told of each number of tokens that it costs.
    """

    id: str = ""
    method: str = ""
    path: str = ""
    client: str = ""
    traceparent: str | None = None
    arrival: float = field(default_factory=time.perf_counter)
    arrived_ns: int = field(default_factory=time.time_ns)
    route: str | None = None
    status: int | None = None
    error: str | None = None
    key_name: str | None = None
    model: str | None = None
    sampling: SamplingParams | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    body: bytes | None = None
    charge: Callable[[int], None] = lambda _: None

    @property
    def elapsed_s(self) -> float:
        """Seconds since its arrival."""
        return time.perf_counter() - self.arrival

    def count_prompt(self, tokens: int) -> None:
        """A prompt has been computed."""
        self.prompt_tokens += tokens
        self.charge(tokens)

    def count_completion(self, tokens: int) -> None:
        """Tokens have been generated."""
        if self.first_token_s is None and tokens:
            self.first_token_s = self.elapsed_s
        self.completion_tokens += tokens
        self.charge(tokens)


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def request_record() -> RequestRecord:
    """The record of the current request; outside of one, a new record that nobody reads."""
    return _current.get() or RequestRecord()


def begin_record(record: RequestRecord) -> None:
    """Makes a record the current task's, and that of the tasks that it starts."""
    _current.set(record)
