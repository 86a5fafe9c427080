"""What a client sees of one request: when it was due, when it left, and when each piece of its answer came."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are seconds of `time.perf_counter`.

    Attributes:
        scheduled_s: when the request was due. Latencies count from here, not from when it was sent: what waits because
            the server, or the client, is stuck has waited all the same (Tene's "coordinated omission").
        sent_s: when its bytes left.
        first_s: when the first piece of the answer came; None, none came.
        last_s: when the last piece came.
        gaps_s: times between consecutive pieces, inter-token latencies.
        prompt_tokens, output_tokens: as the server counted them.
        token_ids: of the answer, where they were asked for.
        text: of the answer.
        error: why it failed; None, it did not.
    """

    scheduled_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    def piece(self, now_s: float) -> None:
        """Takes down that a piece of the answer came."""
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and self.first_s is not None

    @property
    def ttft_s(self) -> float:
        """Time to first token; 0 where none came."""
        return 0.0 if self.first_s is None else self.first_s - self.scheduled_s

    @property
    def e2el_s(self) -> float:
        """From when the request was due to the last piece of its answer."""
        return self.last_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first one; None for an answer of one token."""
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None
