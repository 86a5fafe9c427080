"""What a request says of single tokens: those that may come, those that may not, and those that it favours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams


class GuideError(RuntimeError):
    """A request's `Guide` failed, or gave something that is no mask of the vocabulary."""


class NoTokenError(GuideError):
    """What a request says of single tokens excludes every one of them: its own fault, not the logits'."""


class Constraints:
    """Allowed and banned tokens, the guide, `min_tokens` and the logit bias of one request."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._guide = sampling.guide
        self._min_tokens = sampling.min_tokens if sampling.stop_token_ids else 0
        self._allowed = None if sampling.allowed_token_ids is None else _ids(sampling.allowed_token_ids)
        self._banned, self._stops = _ids(sampling.banned_token_ids), _ids(sampling.stop_token_ids)
        self._biased = np.fromiter(sampling.logit_bias, np.intp, len(sampling.logit_bias))
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self._lasting = bool(sampling.guide or sampling.logit_bias or sampling.banned_token_ids)
        self._lasting |= sampling.allowed_token_ids is not None

    def active(self, generated: int) -> bool:
        """Whether they have a say in the token that comes after so many."""
        return self._lasting or generated < self._min_tokens

    def apply(self, logits_V: NDArray[np.float32], generated: Sequence[int]) -> None:
        """Changes float32 [V] in place; tokens that may not follow `generated` get negative infinity.

        Raises:
            GuideError: the guide raised, or its mask is not bool [V].
        """
        if self._allowed is not None:
            allowed = logits_V[self._allowed]
            logits_V.fill(-np.inf)
            logits_V[self._allowed] = allowed
        logits_V[self._banned] = -np.inf
        if self._guide is not None:
            self._apply_guide(logits_V, generated)
        if len(generated) < self._min_tokens:
            # A checkpoint may name an end token beyond its vocabulary; that one never comes anyway.
            logits_V[self._stops[self._stops < len(logits_V)]] = -np.inf
        logits_V[self._biased] += self._bias

    def _apply_guide(self, logits_V: NDArray[np.float32], generated: Sequence[int]) -> None:
        assert self._guide is not None
        try:
            mask_V = self._guide.allowed(generated)
        except Exception as error:
            raise GuideError(f"the guide failed with {type(error).__name__}: {error}") from error
        if mask_V is None:
            return
        if mask_V.shape != logits_V.shape or mask_V.dtype != np.bool_:
            raise GuideError(
                f"the guide gave {mask_V.dtype} {list(mask_V.shape)}; it must give bool {list(logits_V.shape)}"
            )
        logits_V[~mask_V] = -np.inf


def _ids(token_ids: Collection[int]) -> NDArray[np.intp]:
    return np.fromiter(token_ids, np.intp, len(token_ids))
