"""What a request gets does not depend on what else runs: alone, in a crowd, in pieces, put off, forked, remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_4bit
from drive import Drive, run
from history_runner import VOCABULARY, HistoryRunner, greedy_continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import SCHEMES

from quant.format import Checkpoint, read_checkpoint
from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.native import NativeRunner
from runtime.engine.reference import ReferenceRunner

ROOMY = 4096


def some_requests(seed: int, count: int, vocabulary: int, longest: int = 24) -> list[GenerationRequest]:
    """Requests of all kinds, some of which have the beginning of their prompts in common."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, vocabulary, longest).tolist()
    requests = []
    for i in range(count):
        own = rng.integers(0, vocabulary, rng.integers(1, longest)).tolist()
        prompt = beginning[: rng.integers(0, longest)] + own if rng.random() < 0.6 else own
        sampling = SamplingParams(
            max_tokens=int(rng.integers(1, 14)),
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([1.0, 0.8])),
            top_k=int(rng.choice([0, 5])),
            seed=int(rng.integers(0, 2**63)),
            presence_penalty=float(rng.choice([0.0, 1.0])),
            logprobs=2 if rng.random() < 0.3 else None,
            prompt_logprobs=1 if rng.random() < 0.2 else None,
            stop_token_ids=frozenset({3}) if rng.random() < 0.5 else frozenset(),
        )
        requests.append(
            GenerationRequest(
                f"{i}",
                tuple(prompt),
                sampling,
                n=int(rng.choice([1, 1, 1, 2, 3])),
                priority=int(rng.integers(0, 2)),
                cache_salt=str(rng.choice(["a", "b"])) if rng.random() < 0.3 else None,
            )
        )
    return requests


def chunks_of(
    requests: list[GenerationRequest], runner: HistoryRunner | ReferenceRunner | NativeRunner, **limits: float
) -> dict:
    """All that clients see of each sequence, but for how much the cache helped."""
    drive = Drive(runner, **limits)
    for request in requests:
        drive.scheduler.add(request)
    drive.finish()
    assert drive.pool.num_free == runner.num_blocks
    return {name: [replace(chunk, cached_tokens=0) for chunk in heard.chunks] for name, heard in drive.heard.items()}


def alone(requests: list[GenerationRequest]) -> dict:
    """The same of each request by itself, with room for all and no cache."""
    seen: dict = {}
    for request in requests:
        seen |= chunks_of([request], HistoryRunner(ROOMY), prefix_caching=False)
    return seen


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 12),
    num_blocks=st.integers(15, 40),
    block_size=st.integers(1, 6),
    max_sequences=st.integers(3, 9),
    spare=st.integers(0, 30),
    caching=st.booleans(),
)
@settings(max_examples=60)
def test_any_crowd_in_any_cache(
    seed: int, count: int, num_blocks: int, block_size: int, max_sequences: int, spare: int, caching: bool
) -> None:
    requests = some_requests(seed, count, VOCABULARY)
    runner = HistoryRunner(-(-60 // block_size) + num_blocks // 4, block_size)
    limits = {"max_sequences": max_sequences, "token_budget": max_sequences + spare, "prefix_caching": caching}
    crowd = chunks_of(requests, runner, logit_rows=max_sequences + spare // 3, **limits)
    assert crowd == alone(requests)


def test_greedy_text_is_that_of_the_model_itself() -> None:
    prompts = {"a": (1, 2, 3), "b": tuple(range(30)), "c": (7,)}
    requests = [
        GenerationRequest(name, prompt, SamplingParams(max_tokens=40, temperature=0))
        for name, prompt in prompts.items()
    ]
    tokens = run(requests, HistoryRunner(20), token_budget=5, max_sequences=3)
    assert tokens == {(name, 0): greedy_continuation(prompt, 40) for name, prompt in prompts.items()}


def test_a_crowd_is_put_off_and_copied_and_remembered() -> None:
    """The property test above means what it says: all of these happen in it."""
    requests = some_requests(1, 40, VOCABULARY)
    drive = Drive(runner := HistoryRunner(24), max_sequences=8, token_budget=16)
    for request in requests:
        drive.scheduler.add(request)
    drive.finish()
    stats = drive.scheduler.stats()
    assert stats.preemptions > 10
    assert stats.prefix_cache_hits > 20
    assert runner.copied > 5
    assert max(len(batch) for batch in runner.batches) > 4


def test_a_runner_that_mixes_up_blocks_is_found_out() -> None:
    """The oracle has teeth: without the copies of forked blocks, the tokens are others."""
    request = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=8, seed=5), n=3)
    runner = HistoryRunner(64)
    sound = run([request], runner)
    assert runner.copied == 2
    broken = HistoryRunner(64)
    broken.copy_blocks = lambda sources, targets: None  # type: ignore[method-assign]
    assert run([request], broken) != sound


def test_children_are_those_of_one_request_each() -> None:
    """Child 0 is the request with n = 1; the others draw from streams of their own."""
    request = GenerationRequest("a", (1, 2, 3, 4, 5), SamplingParams(max_tokens=10, seed=9), n=4)
    family = run([request], HistoryRunner(64))
    assert family["a", 0] == run([replace(request, n=1)], HistoryRunner(64))["a", 0]
    assert family["a", 1] == run([replace(request, n=2)], HistoryRunner(64))["a", 1]
    assert len({tuple(tokens) for tokens in family.values()}) == 4


@pytest.mark.parametrize("limits", [{}, {"max_sequences": 4, "token_budget": 7, "logit_rows": 9}])
def test_the_reference_engine_bit_for_bit(quantized: Checkpoint, limits: dict[str, int]) -> None:
    requests = some_requests(3, 10, vocabulary=97, longest=20)
    by_itself: dict = {}
    for request in requests:
        by_itself |= chunks_of([request], ReferenceRunner(quantized), prefix_caching=False)
    crowd = chunks_of(requests, ReferenceRunner(quantized, num_blocks=16, block_size=4), **limits)
    assert crowd == by_itself


@pytest.mark.parametrize("limits", [{}, {"max_sequences": 4, "token_budget": 7, "logit_rows": 9}])
def test_the_native_engine_bit_for_bit(quantized: Checkpoint, limits: dict[str, int]) -> None:
    """Log-probabilities included; on other numbers of threads too, and with blocks for two sequences and a half."""
    requests = some_requests(3, 10, vocabulary=97, longest=20)
    by_itself: dict = {}
    for request in requests:
        by_itself |= chunks_of([request], NativeRunner(quantized.path, threads=1), prefix_caching=False)
    assert chunks_of(requests, NativeRunner(quantized.path, threads=3, num_blocks=5), **limits) == by_itself


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8 kv8 head8", "all at 4 bits"])
def test_blocks_of_the_reference_engine_are_copied_whole(scheme: str, tmp_path: Path) -> None:
    """With the keys and values of 16, 8 and 4 bits."""
    checkpoint = read_checkpoint(write_4bit(tmp_path, scheme=SCHEMES[scheme]))
    wanted = GenerationRequest("a", (5, 6, 7), SamplingParams(max_tokens=12, seed=2, logprobs=5), n=5)
    family = Drive(ReferenceRunner(checkpoint, block_size=8))
    family.scheduler.add(wanted)
    family.finish()
    for index in range(5):
        # What a child said is a prompt: computed afresh, its last position has the logits that the child saw.
        heard = family.heard["a", index]
        prompt = (*wanted.prompt_token_ids, *heard.tokens[:-1])
        afresh = Drive(ReferenceRunner(checkpoint))
        afresh.scheduler.add(GenerationRequest("b", prompt, replace(wanted.sampling, max_tokens=1), n=5))
        afresh.finish()
        assert afresh.heard["b", index].chunks[0].logprobs == heard.chunks[-1].logprobs
