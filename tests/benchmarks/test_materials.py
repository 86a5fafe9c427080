"""What becomes of the rows of the packages: against examples written by hand, and brute force."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from benchmarks.materials import (
    MaterialError,
    RecordsFile,
    balanced_sample,
    hellaswag_task,
    mmlu_task,
    weights_sha256,
    write_rows,
    write_smollm2,
)
from quant.tasks import read_questions


def hellaswag(context: str, *endings: str, label: int = 0) -> dict[str, Any]:
    return {"activity_label": "Juggling", "ctx": context, "endings": list(endings), "expected_index": label}


def test_a_begun_sentence_starts_with_a_capital() -> None:
    task = hellaswag_task(hellaswag("A man stands. He has 3.5 balls. the other man", "smiles.", "leaves.", label=1))
    assert task == {
        "context": "Juggling: A man stands. He has 3.5 balls. The other man",
        "choices": [" smiles.", " leaves."],
        "label": 1,
    }


def test_a_context_that_is_one_begun_sentence() -> None:
    assert hellaswag_task(hellaswag("a man", "sits."))["context"] == "Juggling: A man"


def test_whole_sentences_stay_as_they_are() -> None:
    context = "A man stands. She waits, e.g. for him."
    assert hellaswag_task(hellaswag(context, "x"))["context"] == f"Juggling: {context}"


def test_brackets_are_marks_and_not_text() -> None:
    task = hellaswag_task(hellaswag("[header] How to juggle [title] Take balls. [step] Two.", "[substeps] Throw one. "))
    assert task["context"] == "Juggling: How to juggle. Take balls. Two."
    assert task["choices"] == [" Throw one."]


def test_a_question_of_mmlu_offers_letters() -> None:
    answers = {f"answer_{letter}": letter * 2 for letter in "abcd"}
    task = mmlu_task({"question": "Which?\n", **answers, "correct_answer": "C", "topic": "college physics"})
    assert task == {
        "context": "The following are multiple choice questions (with answers) about college physics.\n\n"
        "Which?\nA. aa\nB. bb\nC. cc\nD. dd\nAnswer:",
        "choices": [" A", " B", " C", " D"],
        "label": 2,
    }


def test_tasks_are_read_by_the_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(hellaswag_task(hellaswag("a man", "sits.", "runs.", label=1))) + "\n")
    (question,) = read_questions(file)
    assert (question.choices, question.label) == ((" sits.", " runs."), 1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1), st.data())
def test_a_sample_is_even_and_does_not_depend_on_order(pairs: list[tuple[str, int]], data: st.DataObject) -> None:
    rows = [{"kind": kind, "n": n} for kind, n in pairs]
    available = Counter(kind for kind, _ in set(pairs))
    count = data.draw(st.integers(1, len(set(pairs))))
    sample = balanced_sample(rows, "kind", count)
    taken = Counter(row["kind"] for row in sample)
    assert len({json.dumps(row) for row in sample}) == len(sample) == count
    # No kind has two more than another one that has some left.
    left = [taken[kind] for kind in available if taken[kind] < available[kind]]
    assert not left or max(taken.values()) - min(left) <= 1
    assert balanced_sample(data.draw(st.permutations(rows)), "kind", count) == sample


def test_a_sample_of_more_than_there_is() -> None:
    with pytest.raises(MaterialError, match="3 different rows are wanted, there are 1"):
        balanced_sample([{"kind": "a"}, {"kind": "a"}], "kind", 3)


def records_file(*rows: dict[str, Any], sha256: str | None = None) -> RecordsFile:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return RecordsFile(lambda _: list(rows), sha256 or hashlib.sha256(text.encode()).hexdigest())


def test_rows_are_written_once(tmp_path: Path) -> None:
    def fetch_again(_: Path) -> list[Any]:
        raise AssertionError

    path, wanted = tmp_path / "rows.jsonl", records_file({"n": 1}, {"n": 2})
    (tmp_path / "scratch").mkdir()
    assert write_rows(path, wanted, tmp_path / "scratch")
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    assert not write_rows(path, RecordsFile(fetch_again, wanted.sha256), tmp_path / "scratch")


def test_other_rows_than_expected_are_not_written(tmp_path: Path) -> None:
    path, scratch = tmp_path / "rows.jsonl", tmp_path / "scratch"
    with pytest.raises(MaterialError, match=r"rows\.jsonl: what was fetched is not the expected text"):
        write_rows(path, records_file({"n": 1}, sha256="0" * 64), scratch)
    assert not path.exists()


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("mine")
    with pytest.raises(MaterialError, match="remove it, or name another directory"):
        write_rows(path, records_file({"n": 1}), tmp_path)
    assert path.read_text() == "mine"


def test_the_digest_of_weights_is_of_names_and_bytes(tmp_path: Path) -> None:
    tensors = {"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 2), np.float16)}
    digests = []
    for number, (stored, metadata) in enumerate(
        ((tensors, "1"), (tensors, "2"), ({**tensors, "b": -tensors["b"]}, "1"))
    ):
        root = tmp_path / str(number)
        root.mkdir()
        save_file(stored, root / "model.safetensors", metadata={"note": metadata})
        digests.append(weights_sha256(root))
    by_hand = hashlib.sha256(b"a" + tensors["a"].tobytes() + b"b" + tensors["b"].tobytes()).hexdigest()
    assert digests[:2] == [by_hand] * 2
    assert digests[2] != by_hand


def test_another_model_in_the_place_of_smollm2_stays(tmp_path: Path) -> None:
    root = tmp_path / "smollm2"
    root.mkdir()
    save_file({"a": np.ones(1, np.float32)}, root / "model.safetensors")
    with pytest.raises(MaterialError, match="does not hold SmolLM2's weights"):
        write_smollm2(root, tmp_path)
    assert (root / "model.safetensors").exists()
