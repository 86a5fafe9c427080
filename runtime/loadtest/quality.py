"""What four bits cost, measured through the same endpoints that were put under load."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import aiohttp

from quant.text import Perplexity, windows
from runtime.loadtest.client import StreamError, post_json, stream_completion
from runtime.loadtest.endpoint import OSP, Endpoint
from runtime.loadtest.record import RequestRecord
from runtime.loadtest.workload import Turn

AGREEMENT_PROMPTS, AGREEMENT_PROMPT_TOKENS, AGREEMENT_TOKENS = 32, 32, 64
"""Of token agreement: how many answers are compared, to beginnings of how many tokens, and their length."""

ROOM_TOKENS = 1
"""Of the context, left free by what is scored: vLLM refuses a prompt that leaves no room for an answer. For all servers
alike, so that perplexities of two tests can be compared."""

Progress = Callable[[], None]


class QualityError(Exception):
    """A server that cannot say what is asked of it; the message says what."""


class QualityProbe:
    """Asks one endpoint for tokens, log-likelihoods and greedy answers."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint, progress: Progress) -> None:
        self.endpoint = endpoint
        self._session, self._progress = session, progress

    async def tokenize(self, text: str) -> list[int]:
        """The text's token ids, special ones as the server adds them.

        Raises:
            QualityError: the server has no `/tokenize` of vLLM's form.
        """
        body = {"model": self.endpoint.model, "prompt": text}
        tokens = (await self._post(f"{self.endpoint.root}/tokenize", body)).get("tokens")
        if not isinstance(tokens, list):
            raise QualityError(f"{self.endpoint.root}/tokenize answers without tokens")
        return tokens

    async def log_likelihoods(self, window: Sequence[int]) -> list[float]:
        """Of every token of `window` but the first, given those before it, in nats.

        Raises:
            QualityError: the server does not echo log-probabilities.
        """
        # vLLM makes at least one token; it is cut off below.
        body = {
            "model": self.endpoint.model,
            "prompt": list(window),
            "max_tokens": 0 if self.endpoint.kind == OSP else 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 0 if self.endpoint.kind == OSP else 1,
        }
        answer = await self._post(f"{self.endpoint.url}/completions", body | dict(self.endpoint.extra_body))
        self._progress()
        try:
            scores = [float(s) for s in answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(window)]]
        except (KeyError, IndexError, TypeError) as error:
            raise self._no_logprobs() from error
        if len(scores) != len(window) - 1:
            raise self._no_logprobs()
        return scores

    async def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The token ids of the likeliest answer.

        Raises:
            QualityError: the server does not tell token ids, or fails.
        """
        if not self.endpoint.tells_token_ids:
            raise QualityError(f"{self.endpoint.url} does not tell the token ids of its answers (return_token_ids)")
        record = RequestRecord(0.0)
        turn = Turn(tuple(prompt), tokens, ignore_eos=True)
        body = self.endpoint.request_body(turn, prefix_cache=False, token_ids=True)
        await stream_completion(self._session, f"{self.endpoint.url}/completions", body, record)
        self._progress()
        if record.error is not None:
            raise QualityError(f"{self.endpoint.url}: {record.error}")
        return record.token_ids

    def _no_logprobs(self) -> QualityError:
        url = self.endpoint.url
        return QualityError(f"{url} does not give the log-probabilities of a prompt (echo and logprobs)")

    async def _post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await post_json(self._session, url, body)
        except StreamError as error:
            raise QualityError(f"{url}: {error}") from error


async def measure_quality(probes: Sequence[QualityProbe], documents: Sequence[str], most_tokens: int) -> dict[str, Any]:
    """The field `quality` of the result.

    Args:
        probes: A's, or A's and B's.
        documents: held-out text; the convention of perplexity is that of `quant.text`.
        most_tokens: so many are scored at most, and the last window whole.

    Returns:
        `perplexity` and `token_agreement`, None where it cannot be measured, with `reasons` why; where nothing can,
        `unavailable`, the reason, alone.
    """
    reasons: list[str] = []

    async def unless_refused(measurement: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return await measurement
        except QualityError as error:
            reasons.append(str(error))
            return None

    try:
        encoded = await _tokens(probes, documents, most_tokens)
    except QualityError as error:
        return {"unavailable": str(error)}
    perplexity = await unless_refused(_perplexities(probes, encoded, most_tokens))
    agreement = await unless_refused(_agreement(probes, encoded)) if len(probes) > 1 else None
    if perplexity is None and agreement is None:
        return {"unavailable": "; ".join(dict.fromkeys(reasons))}
    return {"perplexity": perplexity, "token_agreement": agreement, "reasons": reasons}


def matching_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


async def _tokens(probes: Sequence[QualityProbe], documents: Sequence[str], most_tokens: int) -> list[list[int]]:
    """The documents' tokens, as many documents as are needed.

    Raises:
        QualityError: the servers do not tokenize alike: perplexities over different tokens cannot be compared.
    """
    encoded: list[list[int]] = []
    total = 0
    for document in documents:
        ids = [await probe.tokenize(document) for probe in probes]
        if any(other != ids[0] for other in ids[1:]):
            raise QualityError("A and B do not tokenize alike, so that their perplexities cannot be compared")
        encoded.append(ids[0])
        total += len(ids[0])
        if total > most_tokens and len(encoded) >= AGREEMENT_PROMPTS:
            break
    return encoded


async def _perplexities(
    probes: Sequence[QualityProbe], encoded: Sequence[list[int]], most_tokens: int
) -> dict[str, Any]:
    contexts = [probe.endpoint.context_length for probe in probes]
    if None in contexts:
        raise QualityError("a server does not say how long its context is (max_model_len in /v1/models)")
    longest = min(length for length in contexts if length is not None) - ROOM_TOKENS
    cut = list(_first_windows(windows(encoded, longest), most_tokens))
    found = []
    for probe in probes:
        losses = [-sum(await probe.log_likelihoods(window)) for window in cut]
        found.append(Perplexity.from_sum(sum(losses), sum(len(window) - 1 for window in cut)))
    a, b = found[0].value, found[1].value if len(found) > 1 else None
    return {"A": a, "B": b, "ratio": a / b if b else None, "tokens": found[0].tokens}


def _first_windows(cut: Iterator[list[int]], most_tokens: int) -> Iterator[list[int]]:
    scored = 0
    for window in cut:
        if scored >= most_tokens:
            return
        scored += len(window) - 1
        yield window


async def _agreement(probes: Sequence[QualityProbe], encoded: Sequence[list[int]]) -> dict[str, Any]:
    prompts = [ids[:AGREEMENT_PROMPT_TOKENS] for ids in encoded if ids][:AGREEMENT_PROMPTS]
    pairs = [[await probe.greedy(prompt, AGREEMENT_TOKENS) for probe in probes] for prompt in prompts]
    total = sum(max(len(a), len(b)) for a, b in pairs)
    return {
        "matching_prefix_share": sum(matching_prefix(a, b) for a, b in pairs) / total,
        "equal_texts": sum(a == b for a, b in pairs),
        "prompts": len(prompts),
        "tokens": total,
    }
