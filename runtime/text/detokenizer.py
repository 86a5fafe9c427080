"""Token ids to text, one token at a time, never half a character."""

from __future__ import annotations

import codecs

from runtime.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence.

    Works on bytes: a character that several tokens spell is held back until its last byte is there, and nothing else
    is held back. So the cost of a token does not grow with the text, and all pieces together are exactly what
    decoding the whole sequence at once gives, with U+FFFD for bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, begins_text: bool = False) -> None:
        """Starts a sequence.

        Args:
            skip_special_tokens: leaves special tokens out of the text.
            begins_text: leaves out the space that SentencePiece puts in front of a text. Otherwise it is kept, since
                the text continues a prompt.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._drops_space = begins_text and tokenizer.puts_space_in_front
        # U+FFFD for each maximal ill-formed subsequence (Unicode 16, §3.9), as the tokenizers library does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often one word, sometimes nothing."""
        piece = self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip_special_tokens))
        if piece and self._drops_space:
            self._drops_space = False
            return piece.removeprefix(" ")
        return piece

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD where it ended within a character."""
        return self._utf8.decode(b"", final=True)
