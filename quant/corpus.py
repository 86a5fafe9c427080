"""Text as the quantizer uses it: in token ids, with a name and a hash for the report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from quant.text import TextError, read_documents, windows

BUNDLED_TEXT = Path(__file__).with_name("calibration.txt")
"""What is calibrated on when no text is given: varied English prose, written for this purpose."""

CALIBRATION_TOKENS = 65_536
"""Calibration text is read up to here, unless another limit is set: static scales settle long before."""

HELD_BACK_SHARE = 5
"""One part in this many of the calibration text is held back to measure quality on when no other text is given."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded documents.

    Attributes:
        source: the names of the files and directories read, or "bundled".
        sha256: of the documents' text in UTF-8, one after the other, as it was read: with line feeds for line ends,
            without documents of white space only, and whole where a limit has cut the last one. For a single .txt
            file without carriage returns, that of the file.
        documents: token ids of each.
        cut: a limit of tokens has left some of the text unread.
    """

    source: str | list[str]
    sha256: str
    documents: list[list[int]]
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Of all documents together."""
        return sum(map(len, self.documents))

    def windows(self, context_length: int) -> list[list[int]]:
        """As `text.windows`.

        Raises:
            TextError: there is not one window of 2 tokens.
        """
        cut = list(windows(self.documents, context_length))
        if not cut:
            raise TextError(f"the text {self.source} is too short: not one window of 2 tokens")
        return cut

    def hold_back(self) -> tuple[Corpus, Corpus]:
        """Cuts off the last fifth of the tokens, through the middle of a document where need be."""
        room = self.tokens - self.tokens // HELD_BACK_SHARE
        kept, held = [], []
        for tokens in self.documents:
            kept.append(tokens[:room])
            held.append(tokens[room:])
            room = max(0, room - len(tokens))
        return (
            Corpus(self.source, self.sha256, kept, self.cut),
            Corpus("held back from calibration", self.sha256, held, self.cut),
        )


def read_corpus(paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, limit: int | None = None) -> Corpus:
    """Reads and encodes text; no `paths` mean the bundled one.

    Args:
        limit: reading stops after this many tokens, through the middle of a document where need be.

    Raises:
        TextError: as `text.read_documents`.
    """
    digest, documents, tokens, cut = hashlib.sha256(), [], 0, False
    for document in read_documents(paths or [BUNDLED_TEXT]):
        if tokens == limit:
            cut = True
            break
        digest.update(document.encode())
        ids = tokenizer.encode(document).ids
        kept = ids if limit is None else ids[: limit - tokens]
        cut = len(kept) < len(ids)
        documents.append(kept)
        tokens += len(kept)
    return Corpus([Path(path).name for path in paths] or "bundled", digest.hexdigest(), documents, cut)
