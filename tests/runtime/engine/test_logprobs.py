"""Log-probabilities against torch and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drive import Drive
from history_runner import HistoryRunner, extended, logits_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from quant.format import Checkpoint
from runtime.engine.base import FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from runtime.engine.logprobs import LogitsError, token_logprobs
from runtime.engine.reference import ReferenceRunner
from runtime.engine.workspace import Workspace


@given(
    st.lists(
        st.sampled_from([-np.inf, -60.0, -2.5, 0.0, 0.1, 3.0, 40.0]) | st.floats(-20, 20, width=32),
        min_size=2,
        max_size=300,
    ),
    st.integers(0, 10**6),
    st.integers(0, 20),
)
def test_a_row_against_torch(values: list[float], which: int, top: int) -> None:
    logits_V = np.array(values, np.float32)
    token = which % len(values)
    if not np.isfinite(logits_V.max()):
        return
    expected = torch.log_softmax(torch.from_numpy(logits_V).double(), 0).numpy()
    found = token_logprobs(logits_V, token, top, 0, Workspace(len(values)))
    np.testing.assert_allclose(found.logprob, expected[token], atol=2e-5)
    assert found.token_id == token
    assert found.rank == 1 + sum(logit > logits_V[token] for logit in logits_V)
    order = sorted(range(len(values)), key=lambda i: (-logits_V[i], i))[:top]
    assert [i for i, _ in found.top] == order
    np.testing.assert_allclose([p for _, p in found.top], expected[order], atol=2e-5)


@pytest.mark.parametrize("row", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_a_row_that_says_nothing(row: list[float]) -> None:
    with pytest.raises(LogitsError, match="position 7"):
        token_logprobs(np.array(row, np.float32), 0, 1, 7, Workspace(2))


def drive(runner: ReferenceRunner | HistoryRunner, request: GenerationRequest, **limits: float) -> Drive:
    driven = Drive(runner, **limits)
    driven.scheduler.add(request)
    driven.finish()
    return driven


@pytest.mark.parametrize("limits", [{}, {"token_budget": 5, "max_sequences": 2, "logit_rows": 3}])
def test_prompt_and_output_against_transformers(full_precision: Checkpoint, limits: dict[str, int]) -> None:
    prompt = tuple(np.random.default_rng(0).integers(0, 97, 30).tolist())
    # Temperature and penalties change what is drawn, and not what is reported.
    sampling = SamplingParams(
        8, temperature=3.0, seed=4, logprobs=3, prompt_logprobs=2, presence_penalty=2, banned_token_ids=frozenset({5})
    )
    heard = drive(ReferenceRunner(full_precision), GenerationRequest("a", prompt, sampling), **limits).heard["a", 0]
    ids = [*prompt, *heard.tokens]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(full_precision.path, dtype=torch.float32)(torch.tensor([ids])).logits[
            0
        ]
    expected = torch.log_softmax(logits.double(), -1).numpy()
    first, *told = heard.chunks[0].prompt_logprobs or ()
    assert first is None
    told += [entry for chunk in heard.chunks for entry in chunk.logprobs or ()]
    assert [len(entry.top) for entry in told if entry] == [2] * 29 + [3] * 8
    for position, entry in enumerate(told, 1):
        assert entry is not None
        assert entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(expected[position - 1, ids[position]], abs=1e-4)
        assert [p for _, p in entry.top] == pytest.approx(
            np.sort(expected[position - 1])[::-1][: len(entry.top)].tolist(), abs=1e-4
        )
    assert all(chunk.prompt_logprobs is None for chunk in heard.chunks[1:])


def test_rows_of_logits_are_bounded() -> None:
    runner = HistoryRunner(100)
    scored = GenerationRequest("a", tuple(range(30)) * 3, SamplingParams(2, prompt_logprobs=1))
    driven = Drive(runner, logit_rows=7, max_sequences=3, token_budget=50)
    driven.scheduler.add(scored)
    for name in "bc":
        driven.scheduler.add(GenerationRequest(name, (1, 2, 3), SamplingParams(30)))
    driven.finish()
    rows = [sum(wanted for _, _, wanted in batch) for batch in runner.batches]
    assert max(rows) == 7
    assert len(driven.heard["a", 0].chunks[0].prompt_logprobs or ()) == 90


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_prompt_is_only_scored(length: int) -> None:
    prompt = tuple(range(length))
    driven = drive(
        HistoryRunner(9),
        GenerationRequest("a", prompt, SamplingParams(0, prompt_logprobs=0)),
        token_budget=4,
        max_sequences=2,
    )
    (chunk,) = driven.heard["a", 0].chunks
    assert (chunk.token_ids, chunk.finish_reason, chunk.logprobs) == ((), FinishReason.LENGTH, None)
    assert chunk.prompt_logprobs is not None
    assert len(chunk.prompt_logprobs) == length
    history = 0
    for token, following, entry in zip(prompt, prompt[1:], chunk.prompt_logprobs[1:], strict=False):
        history = extended(history, token)
        expected = torch.log_softmax(torch.from_numpy(logits_of(history)).double(), 0)[following]
        assert isinstance(entry, TokenLogprobs)
        assert entry.logprob == pytest.approx(float(expected), abs=1e-5)
    assert driven.pool.num_free == 9


def test_a_scored_prompt_that_is_put_off_is_scored_once() -> None:
    runner = HistoryRunner(12)
    driven = Drive(runner, max_sequences=4, token_budget=6, logit_rows=4)
    driven.scheduler.add(GenerationRequest("a", (1,) * 4, SamplingParams(33, temperature=0)))
    driven.step()
    scored = GenerationRequest("b", (*range(32), 1, 2, 3, 4), SamplingParams(2, temperature=0, prompt_logprobs=0))
    driven.scheduler.add(scored)
    driven.finish()
    assert driven.scheduler.stats().preemptions > 0
    afresh = drive(HistoryRunner(20), scored)
    assert driven.heard["b", 0] == afresh.heard["b", 0]


def test_only_the_first_child_hears_of_the_prompt() -> None:
    sampling = SamplingParams(2, prompt_logprobs=0, logprobs=0)
    driven = drive(HistoryRunner(20), GenerationRequest("a", (1, 2, 3), sampling, n=3))
    chunks = [driven.heard["a", index].chunks[0] for index in range(3)]
    assert [chunk.prompt_logprobs is not None for chunk in chunks] == [True, False, False]
    assert all(chunk.logprobs and chunk.logprobs[0].top == () for chunk in chunks)
