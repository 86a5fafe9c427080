"""Chooses the next token of a sequence from its row of logits.

The order is vLLM's: what the request says of single tokens (`constraints`), `penalties`, temperature, min_p, top_k,
top_p. A choice depends on the row, the request, the child's index and its tokens so far: not on the batch, nor on what
was drawn before. The random stream is counter-based (Philox), addressed by (seed, child, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams, TokenLogprobs
from runtime.engine.constraints import Constraints, NoTokenError
from runtime.engine.distribution import draw
from runtime.engine.logprobs import LogitsError, highest_logit, token_logprobs
from runtime.engine.penalties import Penalties
from runtime.engine.workspace import Workspace


class Sample(NamedTuple):
    """A chosen token, and its log-probabilities if the request wants them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class TokenSampler:
    """Chooses the tokens of one sequence, one after another.

    Attributes:
        generated: the tokens chosen so far.
    """

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Sequence[int], child: int = 0) -> None:
        self.generated: list[int] = []
        self._sampling = sampling
        self._child = child
        self._prompt_length = len(prompt_token_ids)
        self._constraints = Constraints(sampling)
        self._penalties = Penalties(sampling, prompt_token_ids) if Penalties.wanted(sampling) else None
        self._takes_highest = sampling.temperature == 0 and sampling.logprobs is None and self._penalties is None

    @property
    def greedy(self) -> bool:
        """Whether the next token is that of the highest logit, and nobody asks for more: the row is not needed."""
        return self._takes_highest and not self._constraints.active(len(self.generated))

    @property
    def position(self) -> int:
        """Where the next token will stand, the prompt included in the count."""
        return self._prompt_length + len(self.generated)

    def accept(self, token_id: int) -> Sample:
        """Takes in the token of the highest logit, found elsewhere; -1 stands for logits without one.

        Raises:
            LogitsError: it is -1.
        """
        if token_id < 0:
            raise LogitsError(f"the logits for position {self.position} have no finite maximum (nan or infinity)")
        self.generated.append(token_id)
        if self._penalties is not None:
            self._penalties.push(token_id)
        return Sample(token_id)

    def choose(self, logits_V: NDArray[np.float32], work: Workspace) -> Sample:
        """The next token.

        Args:
            logits_V: float32 [V], contiguous; not changed. Negative infinity excludes a token.

        Raises:
            LogitsError: the logits are not usable.
            NoTokenError: no token may come.
            GuideError: see `Constraints.apply`.
        """
        position, sampling = self.position, self._sampling
        highest_logit(logits_V, position)  # the row by itself, before a constraint can hide what is wrong with it
        token_id = self._pick(logits_V, work)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = token_logprobs(logits_V, token_id, sampling.logprobs, position, work)
        return self.accept(token_id)._replace(logprobs=logprobs)

    def _pick(self, logits_V: NDArray[np.float32], work: Workspace) -> int:
        allowed_V = self._changed(logits_V, work)
        highest = allowed_V.max()
        if not np.isfinite(highest):
            raise NoTokenError(f"no token may come at position {self.position}: the request excludes all of them")
        if self._sampling.temperature == 0:
            return int(allowed_V.argmax())  # the lowest id among equals
        uniform = _uniform(self._sampling.seed, self._child, self.position)
        return draw(allowed_V, highest, self._sampling, uniform, work)

    def _changed(self, logits_V: NDArray[np.float32], work: Workspace) -> NDArray[np.float32]:
        constrained = self._constraints.active(len(self.generated))
        if not constrained and self._penalties is None:
            return logits_V
        changed_V = work.logits_V
        changed_V[:] = logits_V
        if constrained:
            self._constraints.apply(changed_V, self.generated)
        if self._penalties is not None:
            self._penalties.apply(changed_V)
        return changed_V


def _uniform(seed: int, child: int, position: int) -> float:
    """A number in [0, 1): the first of the Philox stream whose key is (seed, position), from block `child` on."""
    key = np.array([seed % 2**64, position], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=child)).random())
