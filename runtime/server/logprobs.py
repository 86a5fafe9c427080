"""Log-probabilities as clients get them: OpenAI's two shapes, and vLLM's of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engine.base import TokenLogprobs
from runtime.server.schemas.chat import ChatLogprobs, ContentLogprob, TokenLogprob
from runtime.server.schemas.completions import CompletionLogprobs, PromptLogprobs
from runtime.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON does not know; OpenAI's number."""


@dataclass(frozen=True, slots=True)
class LogprobWriter:
    """Writes tokens as one request wants them.

    Attributes:
        top: how many of the likeliest tokens are told.
        as_ids: a token is "token_id:5" rather than its text.
    """

    tokenizer: Tokenizer
    top: int = 0
    as_ids: bool = False

    def completion(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """For `/v1/completions`. None stands for the first token of a prompt, which nothing predicts."""
        return CompletionLogprobs(
            text_offset=list(offsets),
            token_logprobs=[None if entry is None else max(entry.logprob, LOWEST) for entry in logprobs],
            tokens=[self._label(id) for id in token_ids],
            top_logprobs=[None if entry is None else self._top(entry) for entry in logprobs],
        )

    def chat(self, logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """For `/v1/chat/completions`."""
        content = []
        for entry in logprobs:
            token = self._entry(entry.token_id, entry.logprob)
            top = [self._entry(id, logprob) for id, logprob in entry.top[: self.top]]
            content.append(
                ContentLogprob(token=token.token, logprob=token.logprob, bytes=token.bytes, top_logprobs=top)
            )
        return ChatLogprobs(content=content)

    def prompt(self, logprobs: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
        """vLLM's `prompt_logprobs`: by token id, the token itself first."""
        written: PromptLogprobs = []
        for entry in logprobs:
            if entry is None:
                written.append(None)
                continue
            ranked = [(id, logprob, rank) for rank, (id, logprob) in enumerate(entry.top[: self.top], 1)]
            ranked = [(entry.token_id, entry.logprob, entry.rank), *(r for r in ranked if r[0] != entry.token_id)]
            written.append(
                {
                    str(id): {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": self._text(id)}
                    for id, logprob, rank in ranked
                }
            )
        return written

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The token itself and the likeliest ones. Of tokens with the same text, the likelier one is told."""
        told = {self._label(entry.token_id): max(entry.logprob, LOWEST)}
        for id, logprob in entry.top[: self.top]:
            told.setdefault(self._label(id), max(logprob, LOWEST))
        return told

    def _label(self, token_id: int) -> str:
        """A token's text; that of a part of a character is "bytes:" and its bytes, as OpenAI writes it."""
        if self.as_ids:
            return f"token_id:{token_id}"
        spelled = self._bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + spelled.decode(errors="backslashreplace")

    def _entry(self, token_id: int, logprob: float) -> TokenLogprob:
        token = f"token_id:{token_id}" if self.as_ids else self._text(token_id)
        return TokenLogprob(token=token, logprob=max(logprob, LOWEST), bytes=list(self._bytes(token_id)))

    def _text(self, token_id: int) -> str:
        return self._bytes(token_id).decode(errors="backslashreplace")

    def _bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id, skip_special_tokens=False)
