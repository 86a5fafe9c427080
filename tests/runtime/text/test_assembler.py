"""Tokens to pieces of text, with all that a request may say of them."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.base import FinishReason, TokenChunk
from runtime.text.assembler import TextAssembler, TextChunk, TextOptions
from runtime.text.tokenizer import Tokenizer

END = 0  # "<|endoftext|>"


def assembled(tokenizer: Tokenizer, tokens: list[int], options: TextOptions, last: FinishReason) -> list[TextChunk]:
    """One token a chunk, until the text ends."""
    assembler, chunks = TextAssembler(tokenizer, options), []
    for place, token in enumerate(tokens, 1):
        chunks.append(assembler.accept(TokenChunk((token,), last if place == len(tokens) else None), 7))
        if chunks[-1].finish_reason is not None:
            break
    return chunks


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    return [next(id for id in range(300) if tokenizer.token_bytes(id) == bytes([byte])) for byte in text.encode()]


@given(text=st.text(alphabet="ab ß好😀", min_size=1, max_size=12))
def test_offsets_are_those_of_the_library(
    byte_level: Tokenizer, byte_level_backend: tokenizers.Tokenizer, text: str
) -> None:
    encoding = byte_level_backend.encode(text)
    chunks = assembled(byte_level, encoding.ids, TextOptions(), FinishReason.LENGTH)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [offset for chunk in chunks for offset in chunk.offsets] == [begin for begin, _ in encoding.offsets]
    assert {chunk.index for chunk in chunks} == {7}


@pytest.mark.parametrize(
    ("options", "text", "stop_reason"),
    [
        (TextOptions(stops=("cd",)), "ab", "cd"),
        (TextOptions(stops=("cd",), include_stop=True), "abcd", "cd"),
        (TextOptions(stops=("bc", "bcd")), "a", "bc"),
        (TextOptions(stops=("abcd", "d"), include_stop=True), "abcd", "abcd"),
        (TextOptions(stops=("a", "e"), min_tokens=2), "abcd", "e"),
        (TextOptions(stops=("bc",), min_tokens=2), "abcdef", None),  # it would begin too early
        (TextOptions(stops=("de",), min_tokens=3), "abc", "de"),
    ],
)
def test_stop_strings(byte_level: Tokenizer, options: TextOptions, text: str, stop_reason: str | None) -> None:
    chunks = assembled(byte_level, spell(byte_level, "abcdef"), options, FinishReason.LENGTH)
    assert "".join(chunk.text for chunk in chunks) == text
    assert chunks[-1].stop_reason == stop_reason
    assert chunks[-1].finish_reason is (FinishReason.LENGTH if stop_reason is None else FinishReason.STOP)


@pytest.mark.parametrize(
    ("options", "text", "stop_reason"),
    [
        (TextOptions(end_token_ids=frozenset({END})), "a", None),
        (TextOptions(stop_token_ids=frozenset({END})), "a", END),
        (TextOptions(end_token_ids=frozenset({END}), skip_special_tokens=False), "a", None),
        (
            TextOptions(end_token_ids=frozenset({END}), skip_special_tokens=False, include_stop=True),
            "a<|endoftext|>",
            None,
        ),
        (TextOptions(stop_token_ids=frozenset({END}), include_stop=True), "a", END),
    ],
)
def test_end_tokens(byte_level: Tokenizer, options: TextOptions, text: str, stop_reason: int | None) -> None:
    chunks = assembled(byte_level, [*spell(byte_level, "a"), END], options, FinishReason.STOP)
    assert "".join(chunk.text for chunk in chunks) == text
    assert chunks[-1].stop_reason == stop_reason


def test_special_tokens_are_shown_where_they_are_not_skipped(
    byte_level: Tokenizer, byte_level_backend: tokenizers.Tokenizer
) -> None:
    tokens = [END, *spell(byte_level, "a😀"), END, *spell(byte_level, "b")]
    for skip in (True, False):
        chunks = assembled(byte_level, tokens, TextOptions(skip_special_tokens=skip), FinishReason.LENGTH)
        text = byte_level_backend.decode(tokens, skip_special_tokens=skip)
        assert "".join(chunk.text for chunk in chunks) == text


def test_tokens_after_a_stop_string_do_not_count(byte_level: Tokenizer) -> None:
    assembler = TextAssembler(byte_level, TextOptions(stops=("b",)))
    chunk = assembler.accept(TokenChunk(tuple(spell(byte_level, "abcd"))), 0)
    assert (chunk.text, chunk.token_ids, chunk.offsets) == ("a", tuple(spell(byte_level, "ab")), (0, 1))
