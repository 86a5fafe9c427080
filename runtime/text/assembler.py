"""From an engine's chunks of tokens to pieces of text: one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.engine.base import FinishReason, TokenChunk, TokenLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.stop import StopMatcher
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the text of a sequence is made, and where it ends.

    Attributes:
        stops: strings that end the text.
        stop_token_ids: tokens that end it because the request says so.
        end_token_ids: tokens that end it because the model says so.
        include_stop: whether the text holds what has ended it.
        skip_special_tokens: whether special tokens are left out of the text.
        min_tokens: text of the first so many tokens is not searched for stop strings.
    """

    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    end_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The next piece of a sequence.

    Attributes:
        index: which of the sequences.
        text: may be empty: the tokens so far may end within a character, or in what may become a stop string.
        token_ids: the tokens that have come, however much of their text is held back.
        offsets: where each token's text begins, in characters of the sequence's text; stop strings count as text.
        logprobs: one a token, if they were asked for.
        finish_reason: set on the sequence's last chunk.
        stop_reason: the string or the token of the request that has ended the text, if one has.
        prompt_logprobs, cached_tokens: see `TokenChunk`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0


class TextAssembler:
    """Makes text of one sequence's tokens, and ends it at a stop string."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._options = options
        self._silent_ids = frozenset() if options.include_stop else options.stop_token_ids | options.end_token_ids
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopMatcher(options.stops, include=options.include_stop)
        self._tokens = 0
        self._characters = 0

    def accept(self, chunk: TokenChunk, index: int) -> TextChunk:
        """The text of the next tokens, up to the stop string that they complete, if they do.

        Args:
            index: the `TextChunk.index` to give it.
        """
        text, offsets = "", []
        for token_id in chunk.token_ids:
            offsets.append(self._characters)
            text += self._text_of(token_id)
            if self._stops.matched is not None:
                break
        if chunk.finish_reason is not None:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        count = len(offsets)
        reason = chunk.finish_reason if self._stops.matched is None else FinishReason.STOP
        return TextChunk(
            index=index,
            text=text,
            token_ids=chunk.token_ids[:count],
            offsets=tuple(offsets),
            logprobs=None if chunk.logprobs is None else chunk.logprobs[:count],
            finish_reason=reason,
            stop_reason=self._stop_reason(chunk, reason),
            prompt_logprobs=chunk.prompt_logprobs,
            cached_tokens=chunk.cached_tokens,
        )

    def _text_of(self, token_id: int) -> str:
        """What may go out now that this token has come."""
        self._tokens += 1
        # Most end tokens have no text. Those that do have it left out: they end the text, as stop strings do.
        if token_id in self._silent_ids:
            return ""
        piece = self._detokenizer.push(token_id)
        self._characters += len(piece)
        return piece if self._tokens <= self._options.min_tokens else self._stops.push(piece)

    def _stop_reason(self, chunk: TokenChunk, reason: FinishReason | None) -> str | int | None:
        if self._stops.matched is not None:
            return self._stops.matched
        if reason is not FinishReason.STOP or chunk.token_ids[-1] in self._options.end_token_ids:
            return None
        return chunk.token_ids[-1]
