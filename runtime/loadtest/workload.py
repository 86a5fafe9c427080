"""What is asked: prompts of random tokens or of real text, alone, with a shared prefix, or turn by turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quant.text import read_documents
from runtime.loadtest.figures import ServiceLevel

Kind = Literal["random", "text", "shared-prefix", "multi-turn"]
KINDS: tuple[Kind, ...] = ("random", "text", "shared-prefix", "multi-turn")

CHARACTERS_PER_TOKEN = 4
"""About, of English: how much of a document makes a prompt of so many tokens."""


class WorkloadError(ValueError):
    """A workload that cannot be; the message says why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        prompt: token ids or text. In a conversation it comes after what was said before.
        max_tokens: of the answer.
        ignore_eos: the answer has exactly so many tokens; else it ends where the model ends it.
    """

    prompt: tuple[int, ...] | str
    max_tokens: int
    ignore_eos: bool


Conversation = tuple[Turn, ...]
"""Turns one after another, each sent when the one before is answered; mostly there is only one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, how often and how fast.

    Attributes:
        num_prompts: requests of a repeat.
        input_len, output_len: tokens of a prompt and of its answer. Of text, input_len is about, output_len at most.
        prefix_len: tokens that all prompts of "shared-prefix" begin with, beside input_len.
        turns: requests of a conversation of "multi-turn".
        request_rate: requests a second (of "multi-turn", conversations); None: closed loop.
        burstiness: see `arrival_times`.
        max_concurrency: requests under way at a time; None, any number.
        prefix_cache: whether a server may reuse what it has computed for an earlier request.
        documents: where "text" comes from.
    """

    kind: Kind = "random"
    num_prompts: int = 64
    input_len: int = 128
    output_len: int = 64
    prefix_len: int = 0
    turns: int = 1
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = 16
    seed: int = 0
    repeats: int = 3
    warmups: int = 4
    prefix_cache: bool = False
    slo: ServiceLevel = field(default_factory=ServiceLevel)
    documents: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raises `WorkloadError` for settings that do not agree."""
        if self.kind == "text" and not self.documents:
            raise WorkloadError("a workload of text needs text: give --dataset-path")
        if self.kind == "shared-prefix" and not self.prefix_len:
            raise WorkloadError("a workload with a shared prefix needs its length: give --random-prefix-len")
        if (self.turns > 1) != (self.kind == "multi-turn"):
            raise WorkloadError("--turns goes with --dataset-name multi-turn, and must be 2 or more there")
        if self.request_rate is None and self.max_concurrency is None:
            raise WorkloadError("without a request rate, say how many requests run at a time: --max-concurrency")

    @property
    def longest(self) -> int:
        """The most tokens that a request and its answer have together, about."""
        return self.prefix_len + self.turns * (self.input_len + self.output_len)

    def conversations(self, vocab_size: int, repeat: int, count: int | None = None) -> list[Conversation]:
        """The conversations of a repeat: the same for A and B, others for every repeat.

        Raises:
            TextError: the documents cannot be read.
        """
        requests = self.num_prompts if count is None else count
        rng = np.random.default_rng((self.seed, repeat))
        if self.kind == "text":
            return self._texts(rng, requests)
        # The prefix is that of the whole test: of the seed alone.
        prefix = _random_ids(np.random.default_rng(self.seed), vocab_size, self.prefix_len)
        return [
            tuple(
                Turn(start + _random_ids(rng, vocab_size, self.input_len), self.output_len, ignore_eos=True)
                for start in (prefix, *((),) * (self.turns - 1))
            )
            for _ in range(-(-requests // self.turns))
        ]

    def to_dict(self) -> dict[str, Any]:
        """The field `workload` of the result."""
        names = (name for name in self.__slots__ if name not in ("slo", "documents"))
        slo = {"ttft_ms": self.slo.ttft_ms, "tpot_ms": self.slo.tpot_ms}
        return {name: getattr(self, name) for name in names} | {
            "slo": slo,
            "documents": [path.name for path in self.documents],
        }

    def _texts(self, rng: np.random.Generator, requests: int) -> list[Conversation]:
        length = CHARACTERS_PER_TOKEN * self.input_len
        documents = list(read_documents(self.documents))
        chosen = rng.permutation(len(documents))
        texts = [_beginning(documents[chosen[i % len(chosen)]], length) for i in range(requests)]
        return [(Turn(text, self.output_len, ignore_eos=False),) for text in texts]


def _random_ids(rng: np.random.Generator, vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, vocab_size, count).tolist())


def _beginning(document: str, length: int) -> str:
    """As many whole words as `length` characters have room for; if it is not one, a part of it."""
    text = document.strip()
    words = re.match(rf"(?s).{{1,{length}}}(?!\S)", text)
    return words[0].rstrip() if words else text[:length]


def total_requests(conversations: Sequence[Conversation]) -> int:
    """How many requests the conversations have together."""
    return sum(len(conversation) for conversation in conversations)
