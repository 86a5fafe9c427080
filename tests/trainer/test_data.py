import json
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from quant.text import TextError, read_documents
from trainer.config import ConfigError, ModelConfig, TrainConfig, preset
from trainer.data import DataError, held_out_windows, prepare, training_batch
from trainer.data_sources import find_sources
from trainer.data_split import source_documents, split_documents, written_documents
from trainer.tokenizer import END_OF_TEXT

SMALL = TrainConfig(ModelConfig(300, 16, 32, 1, 2, context_length=8), batch_tokens=32, seed=5)


def test_prepared_streams_decode_to_the_documents(corpus, tmp_path):
    streams = prepare([corpus], tmp_path, preset("tiny"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = np.split(streams.train[:], np.flatnonzero(streams.train[:] == end)[1:])
    decoded = {tokenizer.decode(piece.tolist()) for piece in pieces}
    held_out = {json.loads(line)["text"] for line in (tmp_path / "held_out.jsonl").read_text("utf-8").splitlines()}
    assert decoded | held_out == set(read_documents([corpus]))
    assert not decoded & held_out
    assert len(held_out) == streams.held_out_documents >= 1


def test_a_run_resumes_with_its_own_corpus_only(corpus, tmp_path):
    first = prepare([corpus], tmp_path / "data", preset("tiny"))
    again = prepare([corpus], tmp_path / "data", preset("tiny"), resume=True)
    np.testing.assert_array_equal(again.train[:], first.train[:])
    (tmp_path / "other.txt").write_text("One document more.", "utf-8")
    with pytest.raises(DataError, match=r"another text than --data names now: other\.txt is new"):
        prepare([corpus, tmp_path / "other.txt"], tmp_path / "data", preset("tiny"), resume=True)


def test_a_fresh_run_never_takes_what_another_left(corpus, tmp_path):
    left = prepare([corpus], tmp_path / "data", preset("tiny")).train
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_the_rows_of_a_batch(world_size):
    stream = np.arange(1000, dtype=np.uint16)
    for step in (0, 29, 61):  # the second and third lie in two epochs
        parts = [training_batch(stream, SMALL, step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), training_batch(stream, SMALL, step))


def test_rows_that_cannot_be_shared_are_an_error():
    with pytest.raises(ConfigError, match="4 rows cannot be shared by 3 processes"):
        training_batch(np.arange(1000, dtype=np.uint16), SMALL, 0, rank=0, world_size=3)


def test_shards_of_any_size_give_the_same_batches(licence_corpus, tmp_path, monkeypatch):
    config = preset("tiny")
    whole = prepare([licence_corpus], tmp_path / "whole", config)
    monkeypatch.setattr("trainer.data.SHARD_TOKENS", 97)
    cut = prepare([licence_corpus], tmp_path / "cut", config)
    files = sorted((tmp_path / "cut").glob("train-*.bin"))
    assert len(files) == -(-len(whole.train) // 97)
    assert {file.stat().st_size for file in files[:-1]} == {2 * 97}
    for step in range(8):
        np.testing.assert_array_equal(
            training_batch(cut.train, config, step), training_batch(whole.train, config, step)
        )


def test_a_document_longer_than_the_context_is_read_whole(tmp_path):
    long = "Long " + " ".join(f"word{i}" for i in range(3000))
    texts = [long, *(f"A short one, number {i}." for i in range(9))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    streams = prepare([tmp_path / "a.jsonl"], tmp_path / "data", preset("tiny"))
    assert long in streams.tokenizer.decode(streams.train[:].tolist())
    longest = max(np.diff(np.flatnonzero(streams.train[:] == streams.end_token_id), append=len(streams.train)))
    assert longest > 10 * preset("tiny").model.context_length


def test_empty_documents_are_left_out_and_counted(licence_corpus, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": " \\n "}\n', "utf-8")
    with_blanks = prepare([licence_corpus, tmp_path / "blank.jsonl"], tmp_path / "with", preset("tiny"))
    without = prepare([licence_corpus], tmp_path / "without", preset("tiny"))
    np.testing.assert_array_equal(with_blanks.train[:], without.train[:])
    assert json.loads((tmp_path / "with" / "data.json").read_text("utf-8"))["empty_documents"] == 2


def test_resuming_reads_no_text_that_is_unchanged(licence_corpus, tmp_path, monkeypatch):
    first = prepare([licence_corpus], tmp_path / "data", preset("tiny"))

    def refuse(*_):
        raise AssertionError("the corpus was read again")

    for name in ("file_documents", "sha256"):
        monkeypatch.setattr(f"trainer.data_sources.{name}", refuse)
    again = prepare([licence_corpus], tmp_path / "data", preset("tiny"), resume=True)
    np.testing.assert_array_equal(again.train[:], first.train[:])


def test_a_shard_deleted_while_training_is_read_on_and_named_on_resuming(licence_corpus, tmp_path):
    config = preset("tiny")
    streams = prepare([licence_corpus], tmp_path / "data", config)
    before = training_batch(streams.train, config, 3)
    (tmp_path / "data" / "train-00000.bin").unlink()
    np.testing.assert_array_equal(training_batch(streams.train, config, 3), before)
    with pytest.raises(DataError, match=r"train-00000\.bin: this token shard is missing"):
        prepare([licence_corpus], tmp_path / "data", config, resume=True)


def test_a_shard_that_was_cut_off_is_named(licence_corpus, tmp_path):
    prepare([licence_corpus], tmp_path / "data", preset("tiny"))
    shard = tmp_path / "data" / "held_out-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"held_out-00000\.bin: this token shard has \d+ bytes and should have"):
        prepare([licence_corpus], tmp_path / "data", preset("tiny"), resume=True)


def test_a_vocabulary_that_does_not_match_is_refused(licence_corpus, tmp_path):
    config = preset("tiny")
    prepare([licence_corpus], tmp_path / "data", config)
    other = replace(config, model=replace(config.model, vocab_size=600))
    with pytest.raises(DataError, match="a vocabulary of 512 tokens, the model has one of 600"):
        prepare([licence_corpus], tmp_path / "data", other, resume=True)


def test_a_preparation_that_fails_leaves_nothing_that_looks_whole(licence_corpus, tmp_path):
    prepare([licence_corpus], tmp_path / "data", preset("tiny"))
    (tmp_path / "data" / "train.jsonl").unlink()
    (tmp_path / "data" / "train.jsonl").mkdir()  # the new one cannot take its place
    with pytest.raises(OSError, match="directory"):
        prepare([licence_corpus], tmp_path / "data", preset("tiny"))
    assert not list((tmp_path / "data").glob("*.bin"))
    with pytest.raises(DataError, match=r"data\.json cannot be read"):
        prepare([licence_corpus], tmp_path / "data", preset("tiny"), resume=True)


def test_a_given_tokenizer_is_used_as_it_is(corpus, licence_corpus, tmp_path):
    prepare([licence_corpus], tmp_path / "theirs", preset("tiny"))
    own = prepare([corpus], tmp_path / "own", preset("tiny"))
    ours = prepare([corpus], tmp_path / "ours", preset("tiny"), tokenizer=tmp_path / "theirs")
    theirs = Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json"))
    assert ours.tokenizer.get_vocab() == theirs.get_vocab() != own.tokenizer.get_vocab()
    first = next(read_documents([tmp_path / "ours" / "train.jsonl"]))
    ids = theirs.encode(first).ids
    assert ours.train[: len(ids)].tolist() == ids
    again = prepare([corpus], tmp_path / "ours", preset("tiny"), resume=True, tokenizer=tmp_path / "theirs")
    assert len(again.train) == len(ours.train)
    with pytest.raises(DataError, match="another tokenizer"):
        prepare([corpus], tmp_path / "ours", preset("tiny"), resume=True, tokenizer=tmp_path / "own")


def test_a_corpus_passes_through_memory_document_by_document(tmp_path):
    words = [f"w{i}" for i in range(400)]
    choose = random.Random(0)
    with (tmp_path / "big.jsonl").open("w") as file:
        for _ in range(3000):
            file.write(json.dumps({"text": " ".join(choose.choices(words, k=1000))}) + "\n")
    size = (tmp_path / "big.jsonl").stat().st_size
    assert size > 12e6
    tracemalloc.start()
    split_documents(source_documents(find_sources([tmp_path / "big.jsonl"])), tmp_path, 0.02)
    documents = written_documents(tmp_path / "train.jsonl")
    assert sum(len(text) for text in documents) > 0.9 * size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 10
