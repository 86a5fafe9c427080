"""Reading text: the documents found, and a clear error for whatever cannot be read."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from quant.corpus import BUNDLED_TEXT, read_corpus
from quant.format import sha256
from quant.text import TextError, read_documents, windows


def test_files_lines_and_directories_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("two\n\nparagraphs", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "één", "id": 1}\n\n{"text": "line\\u2028two"}\n', encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("# three")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "blank.txt").write_text(" \n")
    assert list(read_documents([tmp_path])) == ["één", "line\u2028two", "two\n\nparagraphs", "# three"]
    assert list(read_documents([str(tmp_path / "b.txt"), tmp_path / "deep"])) == ["two\n\nparagraphs", "# three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b" \n", "no text in "),
        ("empty.jsonl", b"", "no text in "),
        ("data.bin", b"x", "not a text file this program reads"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "latin.jsonl: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"content": "x"}', 'a.jsonl:1: no "text" field'),
        ("a.jsonl", b'{"text": 5}', 'a.jsonl:1: no "text" field'),
        ("a.jsonl", b'["text"]', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "a.jsonl:1: the text holds half a surrogate pair"),
    ],
)
def test_unusable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert name in str(caught.value)


def test_missing_and_empty_paths_are_named(tmp_path):
    with pytest.raises(TextError, match="nowhere: no such file"):
        list(read_documents([tmp_path / "nowhere"]))
    with pytest.raises(TextError, match=r"no \.txt, \.md, \.jsonl file in this directory"):
        list(read_documents([tmp_path]))
    with pytest.raises(TextError, match="an empty list of paths"):
        list(read_documents([]))


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")  # to open it would wait for a writer
    with pytest.raises(TextError, match=r"pipe\.txt: not a file"):
        list(read_documents([tmp_path / "pipe.txt"]))
    with pytest.raises(TextError, match=r"no \.txt, \.md, \.jsonl file in this directory"):
        list(read_documents([tmp_path]))
    with pytest.raises(TextError, match="File name too long"):
        list(read_documents([tmp_path / ("x" * 300 + ".txt")]))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(TextError, match="no such file"):
        list(read_documents([tmp_path / "file.txt" / "below.txt"]))


def test_windows_are_consecutive_and_at_least_two_tokens_long():
    assert list(windows([[1, 2, 3, 4, 5], [6], [], [7, 8], [9, 10, 11, 12]], 4)) == [
        [1, 2, 3, 4],
        [7, 8],
        [9, 10, 11, 12],
    ]
    assert list(windows([[1, 2, 3, 4, 5, 6]], 4)) == [[1, 2, 3, 4], [5, 6]]


def test_the_bundled_text_is_the_default(tokenizer):
    corpus = read_corpus([], tokenizer)
    assert corpus.source == "bundled"
    assert corpus.sha256 == sha256(BUNDLED_TEXT)
    assert corpus.tokens == len(BUNDLED_TEXT.read_bytes()) > 10_000  # the tests' tokenizer has a token a byte


def test_reading_stops_at_the_limit(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("aaaa", "bbbb", "cccc")))
    assert [tokenizer.decode(d) for d in read_corpus([file], tokenizer, limit=5).documents] == ["aaaa", "b"]
    for limit in (1, 3, 4, 5, 8, 11, 12, 13, 400):
        assert read_corpus([file], tokenizer, limit=limit).tokens == min(limit, 12)
        assert read_corpus([file], tokenizer, limit=limit).cut == (limit < 12)
    assert not read_corpus([file], tokenizer).cut
    assert [part.cut for part in read_corpus([file], tokenizer, limit=8).hold_back()] == [True, True]
    assert read_corpus([file], tokenizer, limit=5).source == ["a.jsonl"]
    assert read_corpus([file], tokenizer).tokens == 12


def test_the_hash_is_of_the_documents_as_they_were_read(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes(b" \n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "three"}\n')
    for limit in (None, 12):  # the limit cuts tokens, not what is hashed
        assert read_corpus([tmp_path], tokenizer, limit).sha256 == hashlib.sha256(b"one\ntwo\nthree").hexdigest()


def test_the_last_fifth_is_held_back(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("0123456")
    (tmp_path / "b.txt").write_text("789")
    corpus = read_corpus([tmp_path], tokenizer)
    kept, held = corpus.hold_back()
    assert [tokenizer.decode(d) for d in kept.documents] == ["0123456", "7"]
    assert [tokenizer.decode(d) for d in held.documents] == ["", "89"]
    assert held.source == "held back from calibration"
    assert kept.sha256 == held.sha256 == corpus.sha256


def test_text_too_short_for_a_window_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(TextError, match="too short"):
        read_corpus([tmp_path], tokenizer).hold_back()[1].windows(32)
