import json
import os
import sys

import pytest

from quant.text import TextError
from trainer.data_sources import DataError, differences, find_sources

TEXTS = [f"Document {i}: café, 東京, 🙂." for i in range(700)]


def documents(*paths):
    return [text for source in find_sources(paths) for text in source.documents()]


def parquet(file, columns):
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet is an extra: osp-runtime[data]")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), file, row_group_size=128)
    return file


def test_files_are_read_in_the_order_given_and_directories_sorted(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b", "utf-8")
    (folder / "deep" / "a.md").write_text("a", "utf-8")
    (folder / "a.jsonl").write_text('{"text": "1"}\n\n{"text": "2", "other": 3}\n', "utf-8")
    (folder / "ignored.bin").write_bytes(b"\xff")
    assert documents(folder) == ["1", "2", "b", "a"]
    assert documents(folder / "b.txt", folder / "a.jsonl") == ["b", "1", "2"]
    assert [source.name for source in find_sources([folder])] == ["a.jsonl", "b.txt", "deep/a.md"]


def test_parquet_gives_the_text_column(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"id": list(range(700)), "text": TEXTS})
    assert documents(file) == documents(tmp_path) == TEXTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r'a\.parquet: no column "text"; it has body'),
        ({"text": ["a", None, "c"]}, r'a\.parquet: row 2: no "text" field that holds a string'),
        ({"text": [1, 2]}, r'a\.parquet: row 1: no "text" field that holds a string'),
    ],
)
def test_parquet_without_text_is_refused(tmp_path, columns, message):
    with pytest.raises(TextError, match=message):
        documents(parquet(tmp_path / "a.parquet", columns))


def test_a_file_that_only_calls_itself_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="reading Parquet is an extra: osp-runtime[data]")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(TextError, match=r"a\.parquet: cannot be read as Parquet"):
        documents(tmp_path / "a.parquet")


def test_datasets_are_streamed(tmp_path):
    pytest.importorskip("datasets", reason="reading datasets is an extra: osp-runtime[data]")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    (tmp_path / "test.jsonl").write_text('{"text": "the test split"}\n', "utf-8")
    assert documents(f"hf:{tmp_path}") == TEXTS
    assert documents(f"hf:{tmp_path}@test") == ["the test split"]
    (source,) = find_sources([f"hf:{tmp_path}"])
    assert source.entry() == {"dataset": f"hf:{tmp_path}"}
    with pytest.raises(TextError, match="nowhere"):
        documents(f"hf:{tmp_path}@nowhere")
    with pytest.raises(TextError, match=r"hf:.*/not-there: cannot be read"):
        documents(f"hf:{tmp_path}/not-there")


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them fails as if they were not installed
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path, package in ((tmp_path / "a.parquet", "pyarrow"), ("hf:owner/name", "datasets")):
        with pytest.raises(DataError, match=rf"needs {package}, which is not installed; .*'osp-runtime\[data\]'"):
            documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 .* at byte 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": 1}', r'a\.jsonl:2: no "text" field'),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: the text holds half a surrogate pair"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: not a JSON object"),
        ("a.csv", b"text", r"a\.csv: not a text file this program reads"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        documents(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}", "utf-8")
    return tmp_path


def recorded(*paths):
    return json.loads(json.dumps([source.entry() for source in find_sources(paths)]))


def test_an_unchanged_corpus_has_no_differences_wherever_it_lies(folder, tmp_path_factory):
    then = recorded(folder)
    assert differences(then, find_sources([folder])) == []
    moved = tmp_path_factory.mktemp("moved")
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())  # another time of modification, the same text
    assert differences(then, find_sources([moved])) == []


def test_what_has_changed_is_named(folder):
    then = recorded(folder)
    (folder / "a.txt").write_text("text of A.txt", "utf-8")
    os.utime(folder / "a.txt", ns=(0, 12345))
    assert differences(then, find_sources([folder])) == [f"{folder / 'a.txt'} has changed"]
    (folder / "a.txt").write_text("longer than before, at least by a bit", "utf-8")
    assert differences(then, find_sources([folder])) == [f"{folder / 'a.txt'} has changed"]
    (folder / "a.txt").rename(folder / "c.txt")
    assert differences(then, find_sources([folder])) == ["a.txt is missing", "c.txt is new"]


def test_another_order_is_another_corpus(folder):
    then = recorded(folder / "a.txt", folder / "b.txt")
    assert differences(then, find_sources([folder / "b.txt", folder / "a.txt"])) == ["the order was a.txt, b.txt"]
    assert differences(then, find_sources([folder / "a.txt"])) == ["b.txt is missing"]
    assert differences(then, find_sources([folder / "a.txt", "hf:x/y"])) == ["b.txt is missing", "hf:x/y is new"]
