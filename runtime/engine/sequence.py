"""What the scheduler knows of one sequence."""

from __future__ import annotations

from copy import copy

import numpy as np

from runtime.engine.base import FinishReason, GenerationRequest, TokenChunk, TokenLogprobs
from runtime.engine.block_table import BlockTable
from runtime.engine.kv_cache import BlockPool
from runtime.engine.prefix_keys import PrefixKeys
from runtime.engine.runner import SequenceSlice
from runtime.engine.sampler import Sample, TokenSampler


class ScheduledSequence:
    """A sequence of a request, or until its first token all `n` of them, which have the prompt in common.

    Attributes:
        tokens: prompt and generated tokens.
        samplers: by index in the request, whose next tokens are chosen from this sequence's logits.
        table: where the keys and values of its first `computed` tokens lie.
        finished: whether it has ended; the step that is under way may still hold it.
        prompt_logprobs: of the prompt's tokens after the first, as far as they are known.
        cached_tokens: how many tokens the prefix cache gave when it first ran; None: it has not run yet.
    """

    def __init__(self, request: GenerationRequest, arrival: int, pool: BlockPool) -> None:
        self.request = request
        self.tokens = list(request.prompt_token_ids)
        self.samplers = {
            index: TokenSampler(request.sampling, request.prompt_token_ids, index) for index in range(request.n)
        }
        self.table = BlockTable(pool, most_positions(request))
        self.keys = PrefixKeys(self.tokens, pool.block_size, request.cache_salt)
        self.computed = 0
        self.finished = False
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.cached_tokens: int | None = None
        self._arrival = arrival

    @property
    def index(self) -> int:
        """Which of the request's sequences it is, or the first of them."""
        return next(iter(self.samplers))

    @property
    def rank(self) -> tuple[int, int, int]:
        """The order in which sequences are served; no two of a scheduler have the same."""
        return self.request.priority, self._arrival, self.index

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def started(self) -> bool:
        """Whether a token has been generated."""
        return len(self.tokens) > len(self.request.prompt_token_ids)

    @property
    def decoding(self) -> bool:
        """Whether the newest token, a generated one, is all that remains."""
        return self.started and self.remaining == 1

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are still wanted."""
        return self.request.sampling.prompt_logprobs is not None and not self.started

    def slice(self, length: int) -> SequenceSlice:
        """The next `length` tokens."""
        end = self.computed + length
        return SequenceSlice(
            token_ids=np.array(self.tokens[self.computed : end], np.int32),
            start=self.computed,
            block_table=self.table.array(),
            num_logits=length if self.scores_prompt else int(end == len(self.tokens)),
        )

    def fork(self) -> list[ScheduledSequence]:
        """Makes one sequence of each index, this one first. The new ones share its blocks."""
        first, *others = self.samplers.items()
        self.samplers = dict([first])
        return [self, *(self._child(index, sampler) for index, sampler in others)]

    def append(self, sample: Sample) -> TokenChunk:
        """Takes in the next token; says what the client has to hear."""
        chunk = TokenChunk(
            token_ids=(sample.token_id,),
            finish_reason=self._finish_reason(sample.token_id),
            index=self.index,
            logprobs=None if sample.logprobs is None else (sample.logprobs,),
            prompt_logprobs=self._all_prompt_logprobs(),
            cached_tokens=0 if self.started else self.cached_tokens or 0,
        )
        self.tokens.append(sample.token_id)
        self.prompt_logprobs = []  # told, and large
        return chunk

    def scored(self) -> TokenChunk:
        """What the client has to hear of a prompt that was only to be scored."""
        return TokenChunk((), FinishReason.LENGTH, prompt_logprobs=self._all_prompt_logprobs())

    def _all_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        return (None, *self.prompt_logprobs) if self.scores_prompt and self.index == 0 else None

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        generated = len(self.tokens) + 1 - len(self.request.prompt_token_ids)
        return FinishReason.LENGTH if generated >= sampling.max_tokens else None

    def _child(self, index: int, sampler: TokenSampler) -> ScheduledSequence:
        child = copy(self)
        child.tokens = list(self.tokens)
        child.samplers = {index: sampler}
        child.table = self.table.fork()
        child.keys = self.keys.fork(child.tokens)
        child.prompt_logprobs = []
        return child


def most_positions(request: GenerationRequest) -> int:
    """Positions that one sequence of a request fills in the KV cache at most."""
    # The last token generated is never an input, so its keys and values are never computed.
    return len(request.prompt_token_ids) + max(0, request.sampling.max_tokens - 1)
