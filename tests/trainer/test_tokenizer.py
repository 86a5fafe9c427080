import json

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

from quant.format import read_tokenizer
from trainer.config import ConfigError
from trainer.tokenizer import END_OF_TEXT, reuse_tokenizer, save_tokenizer, train_tokenizer

TEXTS = ["Once upon a time there was a café. ", "Twice upon a time: a naïve 東京 🙂 café."]


def test_every_text_comes_back_and_begins_with_the_end_token():
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in [*TEXTS, "unseen: \x00 ﷽ 🏳️‍🌈", ""]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.token_to_id(END_OF_TEXT) == 0
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() <= 300


def test_a_document_that_spells_the_end_token_does_not_end():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.encode(f"a{END_OF_TEXT}b").ids.count(0) == 1


def test_trainer_runtime_and_transformers_encode_alike(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    save_tokenizer(tokenizer, tmp_path, context_length=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    text = "A café upon a time."
    assert read_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer.encode(text).ids
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == tokenizer.encode(text).ids


def test_another_models_tokenizer_begins_documents_as_ours_does(tmp_path):
    theirs = train_tokenizer(TEXTS, 300)
    theirs.post_processor = processors.ByteLevel(trim_offsets=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = reuse_tokenizer(tmp_path, 300)
    assert ours.encode("a café").ids == [0, *theirs.encode("a café").ids]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    theirs = train_tokenizer(TEXTS, 300)
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"ids up to \d+, but the preset's vocabulary has 260"):
        reuse_tokenizer(tmp_path, 260)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no <\|endoftext\|> token"):
        reuse_tokenizer(tmp_path, 260)
