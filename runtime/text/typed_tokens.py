"""Special tokens that somebody typed stay text, though a template mixes them with its own.

Before a template sees what a client sent, the first character of whatever there looks like a special token is
replaced by its number behind an unguessable mark. So in the rendered text every special token is the template's; then
the characters are put back. The mark has only digits: neither JSON nor a change of case touches it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

from runtime.text.tokenizer import Tokenizer


class TypedTokens:
    """Hides and encodes for one prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._mark = f"{secrets.randbits(64):020d}"
        # Longest first, as the tokenizers library matches them.
        ordered = sorted(tokenizer.special_ids, key=len, reverse=True)
        any_token = "|".join(map(re.escape, ordered)) or r"(?!)"
        self._token = re.compile(f"({any_token})")
        self._beginning = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)

    def hide(self, value: Any) -> Any:
        """The same JSON without special tokens, in whatever depth and also in keys."""
        match value:
            case str():
                return self._beginning.sub(lambda found: f"{self._mark}{ord(found[1]):07d}", value)
            case list():
                return [self.hide(item) for item in value]
            case dict():
                return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def encode(self, rendered: str) -> tuple[int, ...]:
        """The tokens of a template's text: special tokens are themselves, except those that were hidden.

        Raises:
            UnicodeEncodeError: see `Tokenizer.encode`.
        """
        if self._mark not in rendered:
            return self._tokenizer.encode_control(rendered)
        return tuple(self._pieces(rendered))

    def _pieces(self, rendered: str) -> Iterator[int]:
        # Text and special tokens take turns, text first. So does the library cut a text.
        for place, piece in enumerate(self._token.split(rendered)):
            if place % 2:
                yield self._tokenizer.special_ids[piece]
            elif piece:
                yield from self._tokenizer.encode(self._restored(piece), add_special_tokens=False)

    def _restored(self, text: str) -> str:
        return re.sub(self._mark + r"(\d{7})", lambda found: chr(int(found[1])), text)
