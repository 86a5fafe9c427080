"""vLLM behind the `Engine` protocol, held against the reference engine's logits. Runs where vLLM is installed."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_client import PROMPT, Client
from numpy.typing import NDArray

from quant.format import read_checkpoint
from runtime.engine.base import (
    DrainingError,
    FinishReason,
    GenerationRequest,
    RequestRejectedError,
    TokenChunk,
    TokenLogprobs,
)
from runtime.engine.reference import ReferenceRunner
from runtime.engine.registry import EngineOptions, load_engine
from runtime.engine.runner import SequenceSlice
from runtime.model_store import resolve_model
from runtime.text.grammar import GrammarCompiler
from runtime.text.tokenizer import Tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed here; docs/vllm.md says how")

MOST_SEQUENCES = 8
TOLERANCE = 0.15
"""Of a log-probability: vLLM computes the whole model in bfloat16, the reference in float32."""


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("demo-16bit")


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[Client]:
    """One engine for all; its end is a test too: what runs is let finish, and what comes then is refused."""
    arguments = {"enforce_eager": True, "max_num_seqs": str(MOST_SEQUENCES)}
    engine = load_engine("vllm", path, options=EngineOptions(vllm=arguments))
    with asyncio.Runner() as loop:
        client = Client(engine, loop)
        yield client

        async def leave() -> None:
            running = asyncio.create_task(client.collect(client.request(max_tokens=20, temperature=0.0)))
            await asyncio.sleep(0.05)
            ending = asyncio.create_task(engine.shutdown(30))
            await asyncio.sleep(0)
            with pytest.raises(DrainingError):
                await client.collect(client.request(max_tokens=1))
            assert (await running)[-1].finish_reason is FinishReason.LENGTH
            await ending

        client.run(leave())


@pytest.fixture(scope="module")
def reference(path: Path) -> ReferenceRunner:
    return ReferenceRunner(read_checkpoint(path))


def reference_logprobs(runner: ReferenceRunner, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Row i: what follows token i, float64 [L, V]."""
    blocks = np.arange(-(-len(tokens) // runner.block_size), dtype=np.int32)
    slice_ = SequenceSlice(np.array(tokens, np.int32), 0, blocks, num_logits=len(tokens))
    logits_LV = runner.step([slice_]).rows().astype(np.float64)
    logits_LV -= logits_LV.max(axis=1, keepdims=True)
    return logits_LV - np.log(np.exp(logits_LV).sum(axis=1, keepdims=True))


def check(found: TokenLogprobs, row_V: NDArray[np.float64], count: int) -> None:
    assert abs(found.logprob - row_V[found.token_id]) < TOLERANCE
    assert len(found.top) == count
    assert list(found.top) == sorted(found.top, key=lambda pair: (-pair[1], pair[0]))
    for token, logprob in found.top:
        assert abs(logprob - row_V[token]) < TOLERANCE
    highest = np.sort(row_V)[-count:] if count else []
    assert all(abs(a - b) < TOLERANCE for a, (_, b) in zip(highest[::-1], found.top, strict=True))
    if (found.token_id, found.logprob) in found.top:
        assert found.rank == 1 + sum(logprob > found.logprob for _, logprob in found.top)
    else:
        assert found.rank > count
        assert np.sum(row_V > found.logprob + TOLERANCE) <= found.rank <= np.sum(row_V > found.logprob - TOLERANCE) + 1


def test_greedy_tokens_and_their_logprobs_are_the_references(client: Client, reference: ReferenceRunner) -> None:
    chunks = client.chunks(max_tokens=24, temperature=0.0, logprobs=5)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert len(tokens) == 24
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    rows = reference_logprobs(reference, [*PROMPT, *tokens])[len(PROMPT) - 1 :]
    for token, found, row_V in zip(tokens, [p for c in chunks for p in c.logprobs or ()], rows[:-1], strict=True):
        assert found.token_id == token
        assert row_V[token] > row_V.max() - TOLERANCE
        check(found, row_V, 5)


def test_logprobs_are_the_models_own(client: Client, reference: ReferenceRunner) -> None:
    """Before temperature, bias and what else the request says."""
    (chunk,) = client.chunks(max_tokens=1, temperature=0.0, logit_bias={1000: 100.0}, logprobs=0, frequency_penalty=1.0)
    assert chunk.token_ids == (1000,)
    assert chunk.logprobs is not None
    check(chunk.logprobs[0], reference_logprobs(reference, PROMPT)[-1], 0)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs(client: Client, reference: ReferenceRunner, max_tokens: int) -> None:
    chunks = client.chunks(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=3)
    assert [c.prompt_logprobs is not None for c in chunks] == [i == 0 for i in range(len(chunks))]
    assert sum(len(chunk.token_ids) for chunk in chunks) == max_tokens
    first, *rest = chunks[0].prompt_logprobs or ()
    assert first is None
    for token, found, row_V in zip(PROMPT[1:], rest, reference_logprobs(reference, PROMPT), strict=False):
        assert found is not None
        assert found.token_id == token
        check(found, row_V, 3)


def test_a_seed_gives_the_same_tokens_and_children_streams_of_their_own(client: Client) -> None:
    three = client.tokens(max_tokens=12, seed=5, n=3)
    assert len({tuple(tokens) for tokens in three}) == 3
    assert client.tokens(max_tokens=12, seed=5)[0] == three[0]
    assert client.tokens(max_tokens=12, seed=6)[0] not in three
    assert client.tokens(max_tokens=6, temperature=0.0, n=2) == client.tokens(max_tokens=6, temperature=0.0) * 2


def test_single_tokens(client: Client) -> None:
    ((greedy, *_),) = client.tokens(max_tokens=4, temperature=0.0)
    assert greedy not in client.tokens(max_tokens=30, banned_token_ids=frozenset({greedy}))[0]
    some = frozenset(range(500, 510))
    (chosen,) = client.tokens(max_tokens=30, allowed_token_ids=some, banned_token_ids=frozenset({500}))
    assert set(chosen) <= some - {500}
    assert client.tokens(max_tokens=3, logit_bias={77: 100.0}, temperature=0.0) == [[77] * 3]


def test_stop_tokens_end_a_sequence_and_are_part_of_it(client: Client) -> None:
    ((*_, third),) = client.tokens(max_tokens=3, temperature=0.0)
    chunks = client.chunks(max_tokens=30, temperature=0.0, stop_token_ids=frozenset({third}))
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].token_ids[-1] == third
    (late,) = client.tokens(max_tokens=30, temperature=0.0, stop_token_ids=frozenset({third}), min_tokens=10)
    assert third not in late[:10]


def test_a_grammar_is_followed(client: Client, path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    compiler = GrammarCompiler(tokenizer, client.engine.info.vocab_size)
    ends = frozenset(tokenizer.end_token_ids)
    demands: list[tuple[Any, Any, str]] = [
        ("regex", r"(red|blue)/[0-9]{3}", r"(red|blue)/[0-9]{3}"),
        ("choice", ["yes", 'no "no"'], r'yes|no "no"'),
        ("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, r"(?s)\{.*\}"),
        ("grammar", 'start: "x"+ "y"', r"x+y"),
    ]
    for kind, source, pattern in demands:
        guide = compiler.compile(kind, source)
        chunks = client.chunks(max_tokens=60, guide=guide, stop_token_ids=ends, seed=2)
        text = b"".join(tokenizer.token_bytes(t) for c in chunks for t in c.token_ids if t not in ends).decode()
        if chunks[-1].finish_reason is FinishReason.STOP:
            assert re.fullmatch(pattern, text), text
        else:  # a random walk through white space and digits may be long
            assert kind in ("json_schema", "grammar")


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 3.0},
        {"temperature": 0.001},
        {"guide": object()},
        {"guide": object(), "stop_token_ids": frozenset({0})},
    ],
)
def test_what_vllm_cannot_do_is_refused(client: Client, change: dict[str, Any]) -> None:
    with pytest.raises(RequestRejectedError, match="engine vllm"):
        client.chunks(max_tokens=2, **change)


def test_a_prompt_that_fills_the_context_is_refused(client: Client) -> None:
    with pytest.raises(RequestRejectedError, match="fills the whole context"):
        client.chunks([5] * 512, max_tokens=0, prompt_logprobs=1)


def test_cached_prefixes_are_shared_under_one_salt_only(client: Client) -> None:
    prompt = [random.Random(1).randrange(1, 4096) for _ in range(400)]
    cached = [
        client.chunks(prompt, max_tokens=1, cache_salt=salt)[0].cached_tokens for salt in ("a", "a", "b", None, None)
    ]
    assert cached[0] == cached[2] == cached[3] == 0
    assert cached[1] == cached[4] >= 256


def test_a_better_priority_goes_first(client: Client) -> None:
    async def order() -> list[str]:
        ended: list[str] = []

        async def one(request: GenerationRequest) -> None:
            await client.collect(request)
            ended.append(request.request_id)

        waiting = [client.request(max_tokens=40, priority=5, seed=i) for i in range(3 * MOST_SEQUENCES)]
        tasks = [asyncio.create_task(one(request)) for request in waiting]
        await asyncio.sleep(0.2)
        urgent = client.request(max_tokens=40, priority=0)
        await asyncio.gather(one(urgent), *tasks)
        return ended[ended.index(urgent.request_id) :]

    assert len(client.run(order())) > MOST_SEQUENCES


def test_one_sequence_is_aborted_and_the_others_go_on(client: Client) -> None:
    async def abort() -> dict[int, list[TokenChunk]]:
        heard: dict[int, list[TokenChunk]] = {0: [], 1: [], 2: []}
        request = client.request(n=3, max_tokens=60, seed=1)
        async for chunk in client.engine.generate(request):
            heard[chunk.index].append(chunk)
            if len(heard[1]) == 3 and chunk.index == 1:
                await client.engine.abort(request.request_id, 1)
        return heard

    heard = client.run(abort())
    assert heard[1][-1].finish_reason is FinishReason.ABORT
    assert len(heard[1]) == 4
    for index in (0, 2):
        assert sum(len(chunk.token_ids) for chunk in heard[index]) == 60


def test_a_request_id_is_taken_while_it_lives(client: Client) -> None:
    async def twice() -> None:
        request = client.request(max_tokens=30)
        first = asyncio.create_task(client.collect(request))
        await asyncio.sleep(0)
        with pytest.raises(RequestRejectedError, match="running already"):
            await client.collect(request)
        await first

    client.run(twice())


def test_steps_are_observed(client: Client) -> None:
    steps: list[tuple[float, int]] = []
    client.engine.observe_steps(lambda seconds, tokens: steps.append((seconds, tokens)))
    client.tokens([7] * 30, max_tokens=5)
    client.engine.observe_steps(lambda *_: None)
    assert sum(tokens for _, tokens in steps) in (34, 35)  # vLLM may have begun a step too many
    assert all(0 < seconds < 60 for seconds, _ in steps)


def test_a_storm_of_500_clients_that_leave(client: Client) -> None:
    rng = random.Random(3)

    async def leave(seed: int) -> None:
        stream = client.engine.generate(client.request(max_tokens=100, seed=seed, n=rng.choice((1, 1, 2))))
        wait = rng.random() * 2
        try:
            async with asyncio.timeout(wait):
                async for _ in stream:
                    pass
        except TimeoutError:
            pass

    async def storm() -> None:
        for _ in range(5):  # no more than may wait
            await asyncio.gather(*(leave(seed) for seed in range(100)))

    client.run(storm())
    stats = client.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
    # vLLM itself has forgotten them: a next one need not wait, and what it counts is only its own.
    assert client.engine._llm.get_num_unfinished_requests() == 0  # type: ignore[attr-defined]
    assert len(client.tokens(max_tokens=5)[0]) == 5

    async def running() -> int:
        chunks = client.engine.generate(client.request(max_tokens=20))
        return max([client.engine._steps._running[0] async for _ in chunks])  # type: ignore[attr-defined]

    assert client.run(running()) == 1
    client.run(client.engine.check_health())
