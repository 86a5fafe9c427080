"""An engine whose requests have several sequences, each with a text of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from scripted_engine import ScriptedEngine

from runtime.engine.base import FinishReason, GenerationRequest, TokenChunk, TokenLogprobs


class ChoirEngine(ScriptedEngine):
    """Child `i` of every request gets the tokens `scripts[i]`, in turns with the others, until it ends or is aborted.

    Attributes:
        generated: tokens that each child got.
        late: whether the first child, which has the prompt's log-probabilities, begins after the others.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], *, late: bool = False) -> None:
        super().__init__(lambda _: ())
        self.generated = [0] * len(scripts)
        self.late = late
        self._scripts = scripts
        self._ended: set[tuple[str, int | None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        scores = request.sampling.prompt_logprobs is not None
        singing = list(range(request.n))
        if self.late:
            singing.reverse()
        while singing:
            for child in list(singing):
                if (request.request_id, child) in self._ended:
                    singing.remove(child)
                    yield TokenChunk((), FinishReason.ABORT, child)
                    continue
                place = self.generated[child]
                self.generated[child] += 1
                last = place + 1 == len(self._scripts[child])
                prompt = request.prompt_token_ids
                entries = (None, *(TokenLogprobs(id, -1.0, 1, ()) for id in prompt[1:]))
                yield TokenChunk(
                    (self._scripts[child][place],),
                    FinishReason.LENGTH if last else None,
                    child,
                    (TokenLogprobs(self._scripts[child][place], -0.5, 1, ()),),
                    entries if scores and child == place == 0 else None,
                )
                if last:
                    singing.remove(child)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        self._ended.add((request_id, index))
        self.aborted.append(request_id if index is None else f"{request_id}/{index}")
