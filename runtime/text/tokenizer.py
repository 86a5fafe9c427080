"""A checkpoint's tokenizer: text to token ids, a token id to its bytes, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from quant.format import read_tokenizer
from runtime.text.named_tokens import end_token_ids, named_tokens
from runtime.text.token_bytes import TokenizerError, spelled_bytes

__all__ = ["Tokenizer", "TokenizerError"]


class Tokenizer:
    """Reads `tokenizer.json`; knows the byte-level BPE and the SentencePiece families.

    Attributes:
        end_token_ids: tokens that end a text: from generation_config.json, else config.json, else
            tokenizer_config.json. Empty where none of them names one.
        named_tokens: texts of special tokens by transformers' names (`bos_token`, …), for templates.
        special_ids: the special tokens, by their text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        end_token_ids: frozenset[int] = frozenset(),
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Takes a backend set up as `read_tokenizer` does; raises `TokenizerError` where it is of neither family."""
        self._backend = backend
        self.end_token_ids = end_token_ids
        self.named_tokens = dict(named_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special}
        self._spelled = spelled_bytes(backend)
        self._shown = self._spelled | dict.fromkeys(self.special_ids.values(), b"")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads the tokenizer of a checkpoint directory.

        Raises:
            CheckpointError: tokenizer.json is missing or damaged.
            TokenizerError: the tokenizer is of an unknown family, or a file that names special tokens is damaged.
        """
        backend = read_tokenizer(directory)
        return cls(backend, end_token_ids(directory, backend), named_tokens(directory))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, in which special tokens are text that somebody typed.

        Args:
            add_special_tokens: puts a BOS where the checkpoint's post-processor puts one.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which is no character.
        """
        text.encode()  # the library's own error for this is a TypeError that blames the type
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_control(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in which special tokens are themselves, and to which none is added.

        Raises:
            UnicodeEncodeError: see `encode`.
        """
        text.encode()
        return tuple(self._control_backend.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The UTF-8 bytes, perhaps not whole characters, that a token adds to a text.

        Empty for special tokens, unless they are not to be skipped, and for ids past the tokenizer's vocabulary
        (rows that pad the embedding).
        """
        return (self._shown if skip_special_tokens else self._spelled).get(token_id, b"")

    def vocabulary_entries(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as tokenizer.json spells them (a space may be "Ġ" or "▁"); empty for ids past its vocabulary."""
        return [self._backend.id_to_token(id) or "" for id in token_ids]

    @cached_property
    def puts_space_in_front(self) -> bool:
        """Whether the tokens of a text spell a space before it, as SentencePiece's do."""
        return b"".join(map(self.token_bytes, self.encode("a", add_special_tokens=False))) == b" a"

    @cached_property
    def added_in_front(self) -> tuple[int, ...]:
        """What `encode` puts in front of a text: usually a BOS, or nothing."""
        return self.encode("")

    def to_json(self) -> str:
        """What tokenizer.json says, as one JSON text."""
        return self._backend.to_str()

    @cached_property
    def _control_backend(self) -> tokenizers.Tokenizer:
        # A second one, since the switch belongs to the backend and other threads encode with the first meanwhile.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend
