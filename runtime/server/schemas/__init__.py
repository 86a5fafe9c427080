"""Requests and responses as they are on the wire: OpenAI's fields and vLLM's, checked."""

from runtime.server.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from runtime.server.schemas.completions import Completion, CompletionRequest
from runtime.server.schemas.models import ModelCard, ModelList

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatRequest",
    "Completion",
    "CompletionRequest",
    "ModelCard",
    "ModelList",
]
