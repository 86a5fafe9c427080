"""Token ids to text, one token at a time, never half a character."""

from __future__ import annotations

import codecs

from runtime.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence.

    Works on bytes: a character that several tokens spell is held back until its last byte is there, and nothing else
    is held back. So the cost of a token does not grow with the text, and all pieces together are exactly what
    decoding the whole sequence at once gives, with U+FFFD for bytes that are no UTF-8.

    A SentencePiece space at the start is kept, since the text continues a prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # U+FFFD for each maximal ill-formed subsequence (Unicode 16, §3.9), as the tokenizers library does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often one word, sometimes nothing."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD where it ended within a character."""
        return self._utf8.decode(b"", final=True)
