"""The bundled models still compute what they did when they were bundled: golden figures, kept in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quant.corpus import BUNDLED_TEXT
from quant.format import read_tokenizer
from runtime.evaluate import load_scorer, perplexity
from runtime.model_store import BUNDLED_MODELS, resolve_model

GOLDEN = Path(__file__).parents[1] / "golden" / "bundled_models.json"
"""Perplexity on the first 4,000 characters of the bundled calibration text, which no training has seen."""


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_golden_perplexity(name: str) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))[name]
    path = resolve_model(name)
    text = BUNDLED_TEXT.read_text("utf-8")[:4000]
    measured = perplexity(load_scorer("reference", path), read_tokenizer(path), [text])
    assert measured.tokens == golden["tokens"]
    # Other processors round exp differently in the last bit, and 4-bit codes near a tie follow.
    assert measured.value == pytest.approx(golden["perplexity"], rel=2e-3)
