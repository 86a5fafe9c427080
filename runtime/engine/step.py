"""One step of the engine: what is to be computed, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import CorruptLogitsError, GenerationError, TokenLogprobs
from runtime.engine.constraints import GuideError
from runtime.engine.logprobs import LogitsError, prompt_logprobs
from runtime.engine.runner import SequenceSlice, StepLogits
from runtime.engine.sampler import Sample
from runtime.engine.sequence import ScheduledSequence
from runtime.engine.workspace import Workspace


@dataclass(slots=True)
class Step:
    """One step's work: `slices[i]` belongs to `sequences[i]`. First of all, KV blocks `copies` (source, target)."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    slices: list[SequenceSlice] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def add(self, sequence: ScheduledSequence, length: int) -> None:
        """Has the next `length` tokens of a sequence computed."""
        self.sequences.append(sequence)
        self.slices.append(sequence.slice(length))


@dataclass(slots=True)
class Outcome:
    """What a step yields for one sequence.

    Attributes:
        samples: its next token, by index in the request: one for each of `ScheduledSequence.samplers`.
        prompt_logprobs: of the next of the prompt's tokens.
        error: why there is none of both. One request's NaN is not the others' affair.
    """

    samples: dict[int, Sample] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: GenerationError | None = None


class OutcomeReader:
    """Chooses tokens and computes log-probabilities from the logits of a step."""

    def __init__(self, vocab_size: int) -> None:
        self._work = Workspace(vocab_size)

    def read(self, step: Step, logits: StepLogits) -> list[Outcome]:
        """One outcome for each of the step's sequences. Asks for the rows of logits only if one needs them."""
        plain = [_is_plain(sequence) for sequence in step.sequences]
        wanted = {greedy for greedy, slice_ in zip(plain, step.slices, strict=True) if slice_.num_logits}
        highest_N = logits.argmax().tolist() if True in wanted else []
        rows_NV = logits.rows() if False in wanted else None
        outcomes, row = [], 0
        for sequence, slice_, greedy in zip(step.sequences, step.slices, plain, strict=True):
            end = row + slice_.num_logits
            try:
                if row == end:
                    outcome = Outcome()
                elif greedy or rows_NV is None:
                    outcome = _take_highest(sequence, highest_N[row])
                else:
                    outcome = self._choose(sequence, slice_, rows_NV[row:end])
            except (LogitsError, GuideError) as error:
                kind = CorruptLogitsError if isinstance(error, LogitsError) else GenerationError
                outcome = Outcome(error=kind(f"request {sequence.request.request_id!r} failed: {error}"))
            outcomes.append(outcome)
            row = end
        return outcomes

    def _choose(self, sequence: ScheduledSequence, slice_: SequenceSlice, rows_LV: NDArray[np.float32]) -> Outcome:
        outcome = Outcome()
        sampling = sequence.request.sampling
        first = slice_.start + len(slice_.token_ids) - len(rows_LV) + 1  # where the token stands that row 0 predicts
        if sampling.prompt_logprobs is not None and sequence.scores_prompt:
            targets = sequence.tokens[first : first + len(rows_LV)]  # one fewer than rows at the prompt's end
            scored_LV = rows_LV[: len(targets)]
            outcome.prompt_logprobs = prompt_logprobs(scored_LV, targets, sampling.prompt_logprobs, first, self._work)
        if first + len(rows_LV) > len(sequence.tokens) and sampling.max_tokens > 0:
            outcome.samples = {
                index: sampler.choose(rows_LV[-1], self._work) for index, sampler in sequence.samplers.items()
            }
        return outcome


def _is_plain(sequence: ScheduledSequence) -> bool:
    return not sequence.scores_prompt and all(sampler.greedy for sampler in sequence.samplers.values())


def _take_highest(sequence: ScheduledSequence, token_id: int) -> Outcome:
    return Outcome({index: sampler.accept(token_id) for index, sampler in sequence.samplers.items()})
