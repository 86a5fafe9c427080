import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from quant.text import TextError, read_documents
from trainer.config import ModelConfig, TrainConfig, preset
from trainer.data import DataError, held_out_windows, prepare, split_documents, training_batch
from trainer.tokenizer import END_OF_TEXT

SMALL = TrainConfig(ModelConfig(300, 16, 32, 1, 2, context_length=8), batch_tokens=32, seed=5)


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


def test_a_run_resumes_with_its_own_corpus_only(corpus, tmp_path):
    first = prepare([corpus], tmp_path / "data", preset("tiny"))
    again = prepare([corpus], tmp_path / "data", preset("tiny"), resume=True)
    np.testing.assert_array_equal(again.train, first.train)
    (tmp_path / "other.txt").write_text("One document more.", "utf-8")
    with pytest.raises(DataError, match="another text"):
        prepare([corpus, tmp_path / "other.txt"], tmp_path / "data", preset("tiny"), resume=True)


def test_a_fresh_run_never_takes_what_another_left(corpus, tmp_path):
    left = np.array(prepare([corpus], tmp_path / "data", preset("tiny")).train)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": f"word {i} " * 99}) + "\n" for i in range(99)))
    assert len(prepare([tmp_path / "new.jsonl"], tmp_path / "data", preset("tiny")).train) != len(left)


def test_calibration_documents_are_training_documents(corpus, tmp_path):
    prepare([corpus], tmp_path, preset("tiny"))
    calibration, held_out = (set(read_documents([tmp_path / f"{n}.jsonl"])) for n in ("calibration", "held_out"))
    assert calibration
    assert calibration <= set(read_documents([corpus])) - held_out


def test_a_too_small_corpus_is_refused_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two", "three")), "utf-8")
    with pytest.raises(DataError, match="at least 1088 are needed"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "data", preset("tiny"))
    assert not (tmp_path / "data" / "data.json").exists()


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n", "utf-8")
    with pytest.raises(TextError, match=r"no text in .*empty\.txt"):
        prepare([tmp_path / "empty.txt"], tmp_path / "data", preset("tiny"))


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
