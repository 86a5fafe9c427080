"""How many tokens a request has cost."""

from __future__ import annotations

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that the prefix cache had."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens, summed over all prompts and choices of a request. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
