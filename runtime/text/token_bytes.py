"""How the tokens of a tokenizer spell bytes: the byte-level BPE and the SentencePiece families."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

_WORD_START = "▁"  # SentencePiece's sign for a space: U+2581, not an underscore
_SENTENCEPIECE_DECODERS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and the fault."""


def spelled_bytes(backend: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The bytes, perhaps not whole characters, of every token by its id.

    Raises:
        TokenizerError: the tokenizer is of an unknown family.
    """
    to_bytes = _family(backend)
    return {id: to_bytes(token) for token, id in backend.get_vocab(with_added_tokens=True).items()}


def _family(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
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
