import json
import random

import pytest

from trainer.data_sources import DataError
from trainer.data_split import (
    calibration_documents,
    split_documents,
    tokenizer_sample,
    write_documents,
    written_documents,
)


def split(documents, folder, held_out=0.1):
    """What `split_documents` counted, and the two parts that it wrote."""
    counted = split_documents(documents, folder, held_out)
    train, held = (list(written_documents(folder / f"{name}.jsonl")) for name in ("train", "held_out"))
    assert (counted.documents, counted.held_out_documents) == (len(train), len(held))
    assert counted.bytes == sum(len(text.encode()) for text in train)
    return counted, train, held


@pytest.mark.parametrize("documents", [[], ["only one"], ["same", "same", "same"]])
def test_a_corpus_that_cannot_be_split_is_refused(documents, tmp_path):
    with pytest.raises(DataError):
        split_documents(documents, tmp_path, 0.02)


def test_the_split_ignores_order_and_keeps_documents_whole(tmp_path):
    documents = [f"document {i} é\u2028\r\n\t" for i in range(1000)]
    _, train, held = split(documents, tmp_path)
    assert sorted(train + held) == sorted(documents)
    assert 60 < len(held) < 140
    shuffled = random.Random(0).sample(documents, len(documents))
    assert set(split(shuffled, tmp_path)[2]) == set(held)
    assert set(split(documents[:500], tmp_path)[2]) == set(held) & set(documents[:500])


def test_at_least_one_document_is_held_out_whichever_the_order(tmp_path):
    documents = [f"document {i}" for i in range(20)]
    _, train, held = split(documents, tmp_path, held_out=1e-9)
    assert len(held) == 1
    assert train == [text for text in documents if text not in held]
    assert split(documents[::-1], tmp_path, held_out=1e-9)[2] == held
    _, train, twice = split(documents * 2, tmp_path, held_out=1e-9)
    assert twice == held * 2
    assert not set(train) & set(held)


def test_documents_of_white_space_are_counted_and_in_neither_part(tmp_path):
    counted, train, held = split(["one", " ", "two", "", "\n\t", "three"], tmp_path)
    assert counted.empty_documents == 3
    assert sorted(train + held) == ["one", "three", "two"]


def test_calibration_takes_the_same_documents_in_any_order(tmp_path):
    documents = [f"document {i}" for i in range(600)]
    write_documents(tmp_path / "a.jsonl", documents)
    write_documents(tmp_path / "b.jsonl", reversed(documents))
    chosen = calibration_documents(tmp_path / "a.jsonl")
    assert len(set(chosen)) == 256
    assert chosen == calibration_documents(tmp_path / "b.jsonl")


def test_a_tokenizer_sees_all_of_a_small_corpus_and_some_of_a_large_one(tmp_path):
    documents = [f"document {i:06d}" for i in range(4000)]
    write_documents(tmp_path / "train.jsonl", documents)
    size = 15 * len(documents)
    assert list(tokenizer_sample(tmp_path / "train.jsonl", size, limit=size)) == documents
    some = list(tokenizer_sample(tmp_path / "train.jsonl", size, limit=size // 4))
    assert 900 < len(some) < 1100
    assert [text for text in documents if text in set(some)] == some


def test_a_document_is_one_line_whatever_is_in_it(tmp_path):
    documents = ['quote " backslash \\ ', "line\nbreak\r\n", "\x00\u2028\u0085", "🙂"]
    write_documents(tmp_path / "a.jsonl", documents)
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == documents == list(written_documents(tmp_path / "a.jsonl"))
