"""Perplexity through a runner against transformers' own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

import runtime.evaluate
from quant.arithmetic import NonFiniteError
from quant.format import Checkpoint, read_tokenizer
from runtime.engine.reference import ReferenceRunner
from runtime.evaluate import NothingToScoreError, perplexity


def text(ids: NDArray[np.int64]) -> str:
    return " ".join(f"t{i}" for i in ids)


@pytest.fixture
def tokenizer(full_precision: Checkpoint) -> Tokenizer:
    return read_tokenizer(full_precision.path)


@pytest.mark.parametrize("logit_rows", [7, 128])
def test_perplexity_matches_transformers(
    full_precision: Checkpoint, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, logit_rows: int
) -> None:
    monkeypatch.setattr(runtime.evaluate, "LOGIT_ROWS", logit_rows)
    rng = np.random.default_rng(0)
    # With a context of 64: a full window and a last one of 1 token; several windows; one short; one of one token.
    documents = [rng.integers(0, 97, length) for length in (65, 150, 20, 1, 64)]
    model = LlamaForCausalLM.from_pretrained(full_precision.path, dtype=torch.float32)
    total, tokens = 0.0, 0
    for ids in documents:
        for window in torch.from_numpy(ids).split(64):
            if len(window) > 1:
                with torch.no_grad():
                    loss = model(window[None], labels=window[None]).loss
                total, tokens = total + float(loss) * (len(window) - 1), tokens + len(window) - 1
    heard: list[int] = []
    measured = perplexity(ReferenceRunner(full_precision), tokenizer, map(text, documents), heard.append)
    assert measured.tokens == tokens == 63 + (63 + 63 + 21) + 19 + 63
    assert measured.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert heard == [63, 126, 189, 210, 229, 292]


def test_nothing_to_score(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    for documents in ([], ["t1", ""]):
        with pytest.raises(NothingToScoreError):
            perplexity(ReferenceRunner(full_precision), tokenizer, documents)


def test_a_model_that_computes_nan(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    runner = ReferenceRunner(full_precision)
    runner.step = lambda batch: np.full((sum(s.num_logits for s in batch), 97), np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="over 2 tokens is nan"):
        perplexity(runner, tokenizer, ["t1 t2 t3"])


def test_a_cache_smaller_than_the_context(full_precision: Checkpoint, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="cannot hold the context of 64"):
        perplexity(ReferenceRunner(full_precision, num_blocks=3), tokenizer, ["t1 t2"])
