"""Perplexity and scores of windows through an engine, against transformers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_4bit
from numpy.typing import NDArray
from schemes import SCHEMES
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

import runtime.evaluate
from quant.arithmetic import NonFiniteError
from quant.format import Checkpoint, read_tokenizer
from quant.tasks import Question, ScoredWindow, score_task
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.reference import ReferenceRunner
from runtime.engine.registry import UnknownEngineError
from runtime.engine.runner import SequenceSlice
from runtime.evaluate import NothingToScoreError, RunnerScorer, load_scorer, perplexity

ENGINES = ("reference", "torch")


def text(ids: Sequence[int] | NDArray[np.int64]) -> str:
    return " ".join(f"t{i}" for i in ids)


@pytest.fixture
def tokenizer(full_precision: Checkpoint) -> Tokenizer:
    return read_tokenizer(full_precision.path)


@pytest.fixture(scope="module")
def transformers_model(full_precision: Checkpoint) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(full_precision.path, dtype=torch.float32)


def log_likelihoods(model: LlamaForCausalLM, ids: Sequence[int]) -> NDArray[np.float64]:
    """Of every token but the first, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), list(ids[1:])].numpy()


EACH_WINDOW = [63, 126, 189, 210, 229, 292]
"""How many tokens are scored after each of the windows of 64, 64, 64, 22, 20 and 64 tokens."""


@pytest.mark.parametrize(
    ("engine", "constant", "value", "wanted"),
    [
        ("reference", "LOGIT_ROWS", 7, EACH_WINDOW),
        ("reference", "LOGIT_ROWS", 128, EACH_WINDOW),
        ("torch", "TORCH_BATCH_TOKENS", 30, [63, 126, 189, 229, 292]),  # the two short ones together
        ("torch", "TORCH_BATCH_TOKENS", 2**16, [292]),
    ],
)
def test_perplexity_matches_transformers(
    full_precision: Checkpoint,
    transformers_model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    constant: str,
    value: int,
    wanted: list[int],
) -> None:
    monkeypatch.setattr(runtime.evaluate, constant, value)
    rng = np.random.default_rng(0)
    # With a context of 64: a full window and a last one of 1 token; several windows; one short; one of one token.
    documents = [rng.integers(0, 97, length) for length in (65, 150, 20, 1, 64)]
    total, tokens = 0.0, 0
    for ids in documents:
        for window in torch.from_numpy(ids).split(64):
            if len(window) > 1:
                with torch.no_grad():
                    loss = transformers_model(window[None], labels=window[None]).loss
                total, tokens = total + float(loss) * (len(window) - 1), tokens + len(window) - 1
    heard: list[int] = []
    measured = perplexity(load_scorer(engine, full_precision.path, heard.append), tokenizer, map(text, documents))
    assert measured.tokens == tokens == 63 + (63 + 63 + 21) + 19 + 63
    assert measured.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert heard == wanted


WINDOWS = [
    ScoredWindow(tuple(int(i) for i in np.random.default_rng(seed).integers(0, 97, length)), scored)
    for seed, (length, scored) in enumerate([(65, 1), (65, 64), (30, 29), (2, 1), (40, 7)])
]
SIBLINGS = [ScoredWindow((*WINDOWS[4].token_ids[:-1], last), scored) for last, scored in ((3, 1), (5, 2), (96, 20))]
"""They differ from one window in their last tokens only."""


@pytest.mark.parametrize("logit_rows", [3, 128])
@pytest.mark.parametrize("engine", ENGINES)
def test_scores_match_transformers(
    full_precision: Checkpoint,
    transformers_model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    logit_rows: int,
) -> None:
    monkeypatch.setattr(runtime.evaluate, "LOGIT_ROWS", logit_rows)
    scores = list(load_scorer(engine, full_precision.path).log_likelihoods(iter(WINDOWS + SIBLINGS)))
    for got, window in zip(scores, WINDOWS + SIBLINGS, strict=True):
        wanted = log_likelihoods(transformers_model, window.token_ids)[-window.scored :]
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_windows_that_differ_in_their_last_token_are_run_once(full_precision: Checkpoint) -> None:
    runner, steps = ReferenceRunner(full_precision), []
    step = runner.step

    def count(batch: Sequence[SequenceSlice]) -> ArrayLogits:
        steps.append([(len(slice_.token_ids), slice_.num_logits) for slice_ in batch])
        return step(batch)

    runner.step = count  # type: ignore[method-assign]
    assert len(list(RunnerScorer(runner).log_likelihoods([WINDOWS[3], *SIBLINGS]))) == 4
    assert steps == [[(1, 1)], [(39, 20)]]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_matches_transformers(
    full_precision: Checkpoint, transformers_model: LlamaForCausalLM, tokenizer: Tokenizer, engine: str
) -> None:
    rng, questions, right = np.random.default_rng(4), [], 0
    for i in range(12):
        context, choices = rng.integers(0, 97, 20), rng.integers(0, 97, (4, 1 if i % 2 else 3))
        questions.append(Question(text(context), tuple(f" {text(choice)}" for choice in choices), i % 4, f"t:{i}"))
        sums = [log_likelihoods(transformers_model, [*context, *choice])[19:].sum() for choice in choices]
        right += int(np.argmax(sums)) == i % 4
    scorer = load_scorer(engine, full_precision.path)
    result = score_task("t", questions, tokenizer, scorer.context_length, scorer.log_likelihoods)
    assert 0 < right < 12  # the comparison says something
    assert result.accuracy == right / 12


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engines_agree_on_every_scheme(tmp_path: Path, scheme: str) -> None:
    path = write_4bit(tmp_path, scheme=SCHEMES[scheme])
    document = text(np.random.default_rng(7).integers(0, 97, 500))
    scorers = [load_scorer(engine, path) for engine in ENGINES]
    values = [perplexity(scorer, read_tokenizer(path), [document]).value for scorer in scorers]
    # A code near a tie may differ, and then those of its window that come after.
    assert values[0] == pytest.approx(values[1], rel=2e-3)
    assert [scorer.engine for scorer in scorers] == list(ENGINES)
    assert {scorer.precision for scorer in scorers} == {SCHEMES[scheme].label}


def test_torch_tells_the_precision_of_a_full_model(full_precision: Checkpoint) -> None:
    assert load_scorer("torch", full_precision.path).precision == "bfloat16"


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(UnknownEngineError, match="no engine 'tensorrt'; it has: auto, native, onnx, reference, torch"):
        load_scorer("tensorrt", Path("nowhere"))


def test_torch_is_asked_for_when_it_is_needed(full_precision: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "quant.stream", raising=False)
    assert load_scorer("reference", full_precision.path).engine == "reference"
    with pytest.raises(ModuleNotFoundError) as caught:
        load_scorer("torch", full_precision.path)
    assert caught.value.name == "torch"


def test_nothing_to_score(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    for documents in ([], ["t1", ""]):
        for engine in ENGINES:
            with pytest.raises(NothingToScoreError):
                perplexity(load_scorer(engine, full_precision.path), tokenizer, documents)


def test_a_model_that_computes_nan(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    runner = ReferenceRunner(full_precision)
    nan = np.full((1000, 97), np.nan, np.float32)
    runner.step = lambda batch: ArrayLogits(nan[: sum(s.num_logits for s in batch)])  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="over 2 tokens is nan"):
        perplexity(RunnerScorer(runner), tokenizer, ["t1 t2 t3"])


def test_a_cache_smaller_than_the_context(full_precision: Checkpoint) -> None:
    with pytest.raises(ValueError, match="cannot hold the context of 64"):
        RunnerScorer(ReferenceRunner(full_precision, num_blocks=3))


def test_documents_are_read_as_they_are_scored(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    """A corpus need not fit into memory."""
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _ in range(5):
            read += 1
            yield "t1 t2 t3"

    behind: list[int] = []
    scorer = RunnerScorer(ReferenceRunner(full_precision), lambda tokens: behind.append(2 * read - tokens))
    perplexity(scorer, tokenizer, documents())
    assert max(behind) <= 4
