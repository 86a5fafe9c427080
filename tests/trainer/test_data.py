import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from trainer.config import ConfigError, ModelConfig, TrainConfig, preset
from trainer.data import DataError, held_out_windows, prepare, read_documents, split_documents, training_batch
from trainer.tokenizer import END_OF_TEXT

SMALL = TrainConfig(ModelConfig(300, 16, 32, 1, 2, context_length=8), batch_tokens=32, seed=5)


def test_documents_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "b.txt").write_text("second\nstill second", "utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "   "}\n', "utf-8")
    (tmp_path / "notes.rst").write_text("not a corpus file", "utf-8")
    assert list(read_documents([tmp_path])) == ["first", "second\nstill second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8 .byte 3."),
        ("a.jsonl", b'{"text": "fine"}\n{"body": 1}\n', "line 2: not a JSON object"),
        ("a.jsonl", b"nonsense\n", "line 1: not a JSON object"),
        ("a.csv", b"x", "expected a file that ends in"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_documents([tmp_path / name]))
    assert name in str(error.value)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_documents([tmp_path / "nowhere"]))


@pytest.mark.parametrize("documents", [[], ["only one"], ["same", "same", "same"]])
def test_a_corpus_that_cannot_be_split_is_refused(documents):
    with pytest.raises(DataError):
        split_documents(documents, 0.02)


def test_the_split_ignores_order_and_keeps_documents_whole():
    documents = [f"document {i}" for i in range(1000)]
    train, held_out = split_documents(documents, 0.1)
    assert sorted(train + held_out) == sorted(documents)
    assert 60 < len(held_out) < 140
    shuffled = random.Random(0).sample(documents, len(documents))
    assert set(split_documents(shuffled, 0.1)[1]) == set(held_out)
    assert set(split_documents(documents[:500], 0.1)[1]) == set(held_out) & set(documents[:500])


def test_prepared_streams_decode_to_the_documents(corpus, tmp_path):
    streams = prepare([corpus], tmp_path, preset("tiny"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = np.split(streams.train, np.flatnonzero(streams.train == end)[1:])
    decoded = {tokenizer.decode(piece.tolist()) for piece in pieces}
    held_out = {json.loads(line)["text"] for line in (tmp_path / "held_out.jsonl").read_text("utf-8").splitlines()}
    assert decoded | held_out == set(read_documents([corpus]))
    assert not decoded & held_out
    assert len(held_out) == streams.held_out_documents >= 1


def test_a_second_run_takes_the_prepared_streams(corpus, tmp_path):
    first = prepare([corpus], tmp_path, preset("tiny"))
    np.testing.assert_array_equal(prepare([tmp_path / "gone"], tmp_path, preset("tiny")).train, first.train)
    with pytest.raises(ConfigError, match="vocabulary of 512"):
        prepare([corpus], tmp_path, preset("demo"))


def test_an_empty_or_too_small_corpus_is_refused_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two", "three")), "utf-8")
    for paths in ([tmp_path / "a.jsonl"], [tmp_path / "empty"]):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="at least"):
            prepare(paths, tmp_path / "data", preset("tiny"))
        assert not (tmp_path / "data" / "data.json").exists()


def test_each_epoch_visits_every_window_once_at_a_new_offset_in_a_new_order():
    stream = np.arange(8 * 41, dtype=np.uint16)  # 40 windows of 8 and room for the offset: 10 steps of 4 rows
    epochs = [np.concatenate([training_batch(stream, SMALL, e * 10 + s).numpy() for s in range(10)]) for e in (0, 1)]
    for windows in epochs:
        assert (np.diff(windows) == 1).all()
        assert len(set(windows[:, 0])) == 40
        assert len(set(windows[:, 0] % 8)) == 1
    assert not (epochs[0] == epochs[1]).all()


def test_a_batch_depends_on_seed_and_step_only():
    stream = np.arange(1000, dtype=np.uint16)
    again = [training_batch(stream, SMALL, step) for step in (7, 90, 7)]
    assert (again[0] == again[2]).all()
    assert (again[0] != again[1]).any()


def test_held_out_windows_spread_over_the_whole_stream():
    windows = held_out_windows(np.arange(1001, dtype=np.uint16), length=10, tokens=50)
    assert windows[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert windows.shape == (5, 11)
    assert held_out_windows(np.arange(5, dtype=np.uint16), length=10, tokens=50).tolist() == [[0, 1, 2, 3, 4]]
