import json

import pytest

from trainer.demo_model import MODELS, card


@pytest.mark.parametrize("name", ["demo", "demo-16bit"])
def test_the_bundled_card_says_what_was_recorded(name):
    report = json.loads((MODELS / "demo" / "osp.json").read_text("utf-8"))
    assert (MODELS / name / "README.md").read_text("utf-8") == card(name, MODELS / name, report)


def test_both_forms_are_of_one_model():
    four, sixteen = (json.loads((MODELS / name / "osp.json").read_text("utf-8")) for name in ("demo", "demo-16bit"))
    for key in ("training", "tokenizer_sha256"):
        assert four[key] == sixteen[key]
    assert four["quality"]["perplexity_16bit"] == sixteen["quality"]["perplexity_16bit"]


def test_the_bundle_is_small():
    assert sum(file.stat().st_size for file in MODELS.rglob("*.*")) < 25e6
