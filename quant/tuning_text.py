"""The text of a tuning run: one stream of tokens, cut into windows, some of them held back. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.corpus import read_corpus
from quant.format import read_config, read_tokenizer
from quant.text import TextError

HELD_BACK = 50
"""One window in so many is held back, to see when tuning stops helping."""

HELD_BACK_TOKENS = 16_384
"""No more is held back."""


@dataclass(frozen=True, slots=True)
class TuningText:
    """Windows of token ids, int64 [.., L + 1]: inputs and, shifted by one, targets.

    Attributes:
        train: in a fixed random order.
        held_back: never trained on.
        source: as `Corpus.source`; `sha256` as `Corpus.sha256`.
    """

    train: NDArray[np.int64]
    held_back: NDArray[np.int64]
    source: str | list[str]
    sha256: str

    @property
    def window_length(self) -> int:
        """L."""
        return int(self.train.shape[1]) - 1

    @classmethod
    def for_model(
        cls, checkpoint: Path, paths: Sequence[str | os.PathLike[str]], longest: int, seed: int
    ) -> TuningText:
        """In windows of the model's context length, or of `longest` tokens where that is less; errors as `read`.

        Raises:
            CheckpointError: `checkpoint` is not a usable one.
        """
        config, _ = read_config(checkpoint)
        length = min(config.max_position_embeddings, longest)
        return cls.read(paths, read_tokenizer(checkpoint), length, seed)

    @classmethod
    def read(
        cls, paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, window_length: int, seed: int
    ) -> TuningText:
        """Reads, encodes and cuts; documents follow one another in a window.

        Raises:
            TextError: the text cannot be read, or is shorter than two windows.
        """
        corpus = read_corpus(paths, tokenizer)
        stream = np.concatenate([np.asarray(document, np.int64) for document in corpus.documents])
        count = (len(stream) - 1) // window_length
        if count < 2:
            raise TextError(
                f"the text to tune on ({corpus.source}) has {len(stream)} tokens; at least {2 * window_length + 1} "
                "are needed"
            )
        order = np.random.default_rng(seed).permutation(count)
        windows = np.stack([stream[i * window_length : (i + 1) * window_length + 1] for i in order])
        held = min(max(1, count // HELD_BACK), max(1, HELD_BACK_TOKENS // window_length))
        return cls(windows[held:], windows[:held], corpus.source, corpus.sha256)

    def batch(self, step: int, batch_tokens: int) -> NDArray[np.int64]:
        """The windows of a step, as many as `batch_tokens` hold and at least one: each comes once before one comes
        again."""
        rows = max(1, batch_tokens // self.window_length)
        chosen: NDArray[np.int64] = self.train[np.arange(step * rows, (step + 1) * rows) % len(self.train)]
        return chosen
