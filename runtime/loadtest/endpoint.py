"""A server's completions endpoint, as this program reaches it: its address, its model, what it knows beyond OpenAI."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.loadtest.workload import Turn

OSP, VLLM, LLAMA_CPP = "osp-runtime", "vllm", "llamacpp"
"""What these servers call themselves in `owned_by` of `/v1/models`."""


class EndpointError(Exception):
    """A server that cannot be tested; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: without the route: `http://127.0.0.1:8000/v1`.
        model: the name that requests say.
        kind: `owned_by` of the model: what fields beyond OpenAI's the server knows.
        context_length: tokens of prompt and answer together; None where the server does not say.
        vocab_size: None where the server does not say.
        engine, precision, kernel: as an osp server says; of another one, the engine is its kind.
        headers: of every request, the key among them.
        extra_body: fields of every request that the user asked for.
    """

    url: str
    model: str
    kind: str
    context_length: int | None = None
    vocab_size: int | None = None
    engine: str | None = None
    precision: str | None = None
    kernel: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """Of the routes that are not OpenAI's."""
        return self.url.removesuffix("/v1")

    @property
    def tells_token_ids(self) -> bool:
        """Whether answers have their token ids if asked."""
        return self.kind in (OSP, VLLM)

    def request_body(self, turn: Turn, *, prefix_cache: bool, token_ids: bool = False) -> dict[str, Any]:
        """A streamed, greedy completion.

        Args:
            prefix_cache: False keeps the server from reusing earlier prompts, where it is known how: by a salt that no
                other request has (osp, vLLM), by `cache_prompt` (llama-server).
            token_ids: asks for those of the answer; the server must tell them.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": turn.prompt,
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if turn.ignore_eos:
            body["ignore_eos"] = True
        if token_ids:
            body["return_token_ids"] = True
        if not prefix_cache and self.kind in (OSP, VLLM):
            body["cache_salt"] = uuid.uuid4().hex
        if not prefix_cache and self.kind == LLAMA_CPP:
            body["cache_prompt"] = False
        return body | dict(self.extra_body)
