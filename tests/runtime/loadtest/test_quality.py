"""Quality through an endpoint, against the engine's own perplexity and against answers taken with another client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import write_4bit, write_byte_level_tokenizer, write_served
from fake_server import FakeServer
from server_process import ServerProcess, running_server

from quant.format import read_tokenizer
from quant.text import Perplexity
from runtime.engine.registry import load_runner
from runtime.evaluate import RunnerScorer, perplexity
from runtime.loadtest.endpoint import Endpoint
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.quality import AGREEMENT_TOKENS, QualityProbe, matching_prefix, measure_quality

DOCUMENTS = ["The cat sat on the mat. " * 12, "Once upon a time there was a little cat.", "cat " * 150]
ALL = 1_000_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    shape = {"vocab_size": 320, "max_position_embeddings": 128, "num_hidden_layers": 2, "eos_token_id": 0}
    other = write_4bit(root / "b", seed=1, write_tokenizer=write_byte_level_tokenizer, **shape)
    return write_served(root / "a"), other


@pytest.fixture(scope="module")
def servers(models: tuple[Path, Path]) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    with running_server(str(models[0])) as a, running_server(str(models[1])) as b:
        yield a, b


def measured(*urls: str, most_tokens: int = ALL) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with open_session({}, 60) as session:
            probes = [
                QualityProbe(session, await find_endpoint(session, url, None, {}, {}), lambda: None) for url in urls
            ]
            return await measure_quality(probes, DOCUMENTS, most_tokens)

    return asyncio.run(run())


def engine_perplexity(path: Path) -> Perplexity:
    """Over windows that leave a token of the context free."""
    scorer = RunnerScorer(load_runner("auto", path))
    scorer.context_length -= 1
    return perplexity(scorer, read_tokenizer(path), DOCUMENTS)


def test_perplexity_is_that_of_the_engine(
    servers: tuple[ServerProcess, ServerProcess], models: tuple[Path, Path]
) -> None:
    found = measured(*(server.url for server in servers))["perplexity"]

    expected = [engine_perplexity(path) for path in models]
    assert found["tokens"] == expected[0].tokens
    assert found["A"] == pytest.approx(expected[0].value, rel=1e-6)
    assert found["B"] == pytest.approx(expected[1].value, rel=1e-6)
    assert found["ratio"] == pytest.approx(expected[0].value / expected[1].value, rel=1e-6)


def test_token_agreement_is_that_of_answers_fetched_otherwise(
    servers: tuple[ServerProcess, ServerProcess], models: tuple[Path, Path]
) -> None:
    found = measured(*(server.url for server in servers))["token_agreement"]

    same = 0
    for document in DOCUMENTS:
        ids = read_tokenizer(models[0]).encode(document).ids[:32]
        body = {
            "prompt": ids,
            "max_tokens": AGREEMENT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answers = [httpx.post(f"{server.url}/v1/completions", json=body).json() for server in servers]
        a, b = (answer["choices"][0]["token_ids"] for answer in answers)
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), AGREEMENT_TOKENS)
    assert found["prompts"] == 3
    assert found["tokens"] == 3 * AGREEMENT_TOKENS
    assert found["matching_prefix_share"] == pytest.approx(same / (3 * AGREEMENT_TOKENS))


def test_a_model_agrees_with_itself(servers: tuple[ServerProcess, ServerProcess]) -> None:
    found = measured(servers[0].url, servers[0].url, most_tokens=200)

    assert found["perplexity"]["ratio"] == 1.0
    assert 200 <= found["perplexity"]["tokens"] < 200 + 128
    assert found["token_agreement"]["matching_prefix_share"] == 1.0
    assert found["token_agreement"]["equal_texts"] == 3


def test_tokenizers_that_differ_make_no_comparison() -> None:
    class Tokenizing(QualityProbe):
        async def tokenize(self, text: str) -> list[int]:
            return list(range(len(text) // len(self.endpoint.model)))

    async def run() -> dict[str, Any]:
        async with open_session({}, 5) as session:
            endpoints = [Endpoint("http://127.0.0.1:9/v1", model, "someone", 64) for model in ("a", "bb")]
            probes = [Tokenizing(session, endpoint, lambda: None) for endpoint in endpoints]
            return await measure_quality(probes, DOCUMENTS, ALL)

    assert "A and B do not tokenize alike" in asyncio.run(run())["unavailable"]


def test_a_server_without_logprobs_is_told_by_its_lack() -> None:
    class Tokenizing(QualityProbe):
        async def tokenize(self, text: str) -> list[int]:
            return list(range(len(text)))

    async def run() -> dict[str, Any]:
        server = FakeServer(whole={"choices": [{"text": "t", "logprobs": None}]})
        async with server.running(), open_session({}, 5) as session:
            endpoint = Endpoint(server.url, "fake", "someone", context_length=64)
            return await measure_quality([Tokenizing(session, endpoint, lambda: None)], DOCUMENTS, ALL)

    assert "does not give the log-probabilities of a prompt" in asyncio.run(run())["unavailable"]


def test_a_server_without_tokenize_is_told_by_its_lack() -> None:
    async def run() -> dict[str, Any]:
        async with (server := FakeServer()).running(), open_session({}, 5) as session:
            endpoint = Endpoint(server.url, "fake", "someone", context_length=64)
            return await measure_quality([QualityProbe(session, endpoint, lambda: None)], DOCUMENTS, ALL)

    assert "/tokenize: HTTP 404: no such route" in asyncio.run(run())["unavailable"]


def test_matching_prefix() -> None:
    assert matching_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert matching_prefix([1], [1, 2]) == 1
    assert matching_prefix([], [1]) == 0
