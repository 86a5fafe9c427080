"""A checkpoint's tokenizer: text to token ids, a token id to its bytes, and the tokens that end a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from quant.format import read_tokenizer

_WORD_START = "▁"  # SentencePiece's sign for a space: U+2581, not an underscore
_SENTENCEPIECE_DECODERS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and the fault."""


class Tokenizer:
    """Reads `tokenizer.json`; knows the byte-level BPE and the SentencePiece families.

    Attributes:
        end_token_ids: tokens that end a text: from generation_config.json, else config.json, else
            tokenizer_config.json. Empty where none of them names one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_token_ids: frozenset[int] = frozenset()) -> None:
        """Takes a backend set up as `read_tokenizer` does; raises `TokenizerError` where it is of neither family."""
        self._backend = backend
        self.end_token_ids = end_token_ids
        self._token_bytes = _token_bytes(backend)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads the tokenizer of a checkpoint directory.

        Raises:
            CheckpointError: tokenizer.json is missing or damaged.
            TokenizerError: the tokenizer is of an unknown family, or a file that names end tokens is damaged.
        """
        backend = read_tokenizer(directory)
        return cls(backend, _end_token_ids(directory, backend))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids, with a BOS where the checkpoint's post-processor puts one, and only there.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which is no character.
        """
        text.encode()  # the library's own error for this is a TypeError that blames the type
        return tuple(self._backend.encode(text).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps not whole characters, that a token adds to a text.

        Empty for special tokens, and for ids past the tokenizer's vocabulary (rows that pad the embedding).
        """
        return self._token_bytes.get(token_id, b"")


def _token_bytes(backend: tokenizers.Tokenizer) -> dict[int, bytes]:
    to_bytes = _family(backend)
    special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return {id: b"" if id in special else to_bytes(token) for token, id in vocabulary.items()}


def _family(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How the tokens of this tokenizer spell bytes."""
    decoders = set(_decoder_types(json.loads(backend.to_str())["decoder"]))
    if "ByteLevel" in decoders:
        return _byte_level
    if decoders and decoders <= _SENTENCEPIECE_DECODERS:
        return _sentencepiece
    raise TokenizerError(
        f"tokenizer.json has the decoder {'+'.join(sorted(decoders)) or 'none'}; "
        "supported are byte-level BPE and SentencePiece tokenizers"
    )


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_types(part)
    else:
        yield decoder["type"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[character] for character in token)
    except KeyError:  # an added token, which is stored as plain text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_WORD_START, " ").encode()


def _end_token_ids(directory: Path, backend: tokenizers.Tokenizer) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return _checked_ids(ids, directory / name)
    token = _read_json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    id = backend.token_to_id(token) if isinstance(token, str) else None
    return frozenset() if id is None else frozenset({id})


def _checked_ids(ids: object, file: Path) -> frozenset[int]:
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and id >= 0 for id in listed):
        raise TokenizerError(f"{file}: eos_token_id must be a token id or a list of them, is {ids!r}")
    return frozenset(listed)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content
