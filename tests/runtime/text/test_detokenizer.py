from __future__ import annotations

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ids = st.lists(st.integers(0, 310), max_size=40)  # some past the vocabulary, as in a padded embedding


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(id) for id in token_ids), detokenizer.flush()]


@given(token_ids=ids)
def test_byte_level_pieces_join_to_what_the_library_decodes(
    byte_level: Tokenizer, byte_level_backend: tokenizers.Tokenizer, token_ids: list[int]
) -> None:
    assert "".join(pieces(byte_level, token_ids)) == byte_level_backend.decode(token_ids)


@given(text=st.text(alphabet="ab çß你好😀\N{ZERO WIDTH JOINER}\n", max_size=20))
def test_no_piece_of_a_valid_text_holds_half_a_character(byte_level: Tokenizer, text: str) -> None:
    deltas = pieces(byte_level, list(byte_level.encode(text)))
    assert "".join(deltas) == text
    assert not any(REPLACEMENT in delta for delta in deltas)


@given(text=st.text(alphabet="the catséü你😀", max_size=20))
def test_sentencepiece_text_continues_its_prompt(
    sentencepiece: Tokenizer, sentencepiece_backend: tokenizers.Tokenizer, text: str
) -> None:
    decode = sentencepiece_backend.decode
    prompt, whole = list(sentencepiece.encode("the")), list(sentencepiece.encode("the" + text))
    assert whole[: len(prompt)] == prompt
    continuation = "".join(pieces(sentencepiece, whole[len(prompt) :]))
    assert decode(prompt) + continuation == decode(whole)


def test_an_emoji_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    token_ids = [id for byte in "😀".encode() for id in range(300) if byte_level.token_bytes(id) == bytes([byte])]
    assert len(token_ids) == 4
    assert pieces(byte_level, token_ids) == ["", "", "", "😀", ""]


def test_invalid_bytes_are_replaced_at_once_and_unfinished_ones_at_the_end(byte_level: Tokenizer) -> None:
    never, begin = (id for byte in (0xFF, 0xF0) for id in range(300) if byte_level.token_bytes(id) == bytes([byte]))
    assert pieces(byte_level, [never, begin]) == [REPLACEMENT, "", REPLACEMENT]
