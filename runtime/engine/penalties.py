"""Makes tokens that have been there less likely: repetition, frequency and presence penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams


class Penalties:
    """The penalties of one sequence, and the tokens that they fall on.

    A logit is first divided by the repetition penalty if it is positive, or multiplied by it if not, where the token
    is one of prompt or output (arXiv:1909.05858, section 4.1); then the frequency penalty is taken off once for each
    time that it was generated, and the presence penalty once if it was.
    """

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._repetition = np.float32(sampling.repetition_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        # The distinct tokens in the order in which they came, in arrays that have room for more.
        prompt = list(dict.fromkeys(prompt_token_ids)) if sampling.repetition_penalty != 1 else []
        self._place = {token: place for place, token in enumerate(prompt)}
        room = max(64, 2 * len(prompt))
        self._ids, self._counts = np.zeros(room, np.intp), np.zeros(room, np.float32)
        self._ids[: len(prompt)] = prompt

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        """Whether any penalty has an effect."""
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        return penalties != (1, 0, 0)

    def push(self, token_id: int) -> None:
        """Counts a generated token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate([old, np.zeros_like(old)]) for old in (self._ids, self._counts))
        self._ids[place] = token_id
        self._counts[place] += 1

    def apply(self, logits_V: NDArray[np.float32]) -> None:
        """Changes float32 [V] in place."""
        ids, counts = self._ids[: len(self._place)], self._counts[: len(self._place)]
        logits = logits_V[ids]
        logits = np.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits_V[ids] = logits - (self._frequency * counts + self._presence * (counts > 0))
