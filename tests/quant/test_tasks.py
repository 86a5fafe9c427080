"""Multiple-choice tasks: reading, cutting into windows, scoring by definition."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from quant.arithmetic import NonFiniteError
from quant.tasks import Question, read_questions, score_task
from quant.text import TextError

CONTEXT = 32


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    """A token a byte, but for " b" and "ab", which are one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "Ġb", "ab", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "b"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_special(tokenizer: Tokenizer, template: str) -> Tokenizer:
    other = Tokenizer.from_str(tokenizer.to_str())
    special = [("<s>", tokenizer.token_to_id("<s>"))]
    other.add_special_tokens(["<s>"])
    other.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return other


class Model:
    """Gives each token a score that follows from it and from what is before it; remembers what it was asked."""

    def __init__(self) -> None:
        self.windows = []

    def __call__(self, windows):
        self.windows = list(windows)
        return [np.array(self.scores(w.token_ids)[-w.scored :]) for w in self.windows]

    @staticmethod
    def scores(ids):
        return [-((7 * before + 13 * token) % 31) / 8 for before, token in pairwise(ids)]


def question(context, *choices, label=0):
    return Question(context, choices, label, "task.jsonl:1")


def asked(tokenizer, context, *choices):
    """(token ids as text, scored part as text) of each window."""
    model = Model()
    score_task("task", [question(context, *choices)], tokenizer, CONTEXT, model)
    return [(tokenizer.decode(w.token_ids), tokenizer.decode(w.token_ids[-w.scored :])) for w in model.windows]


def test_questions_are_read_in_order(tmp_path):
    first = {"context": "a", "choices": [" b", " c", " é"], "label": 2, "id": 5}
    second = {"context": "", "choices": ["x", "y"], "label": 0}
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n", encoding="utf-8")
    where = str(tmp_path / "t.jsonl")
    assert read_questions(tmp_path / "t.jsonl") == [
        Question("a", (" b", " c", " é"), 2, f"{where}:1"),
        Question("", ("x", "y"), 0, f"{where}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"choices": ["a", "b"], "label": 0}', 'no "context" field'),
        ('{"context": 3, "choices": ["a", "b"], "label": 0}', 'no "context" field'),
        ('{"context": "c", "label": 0}', '"choices" must be a list of at least two strings, is None'),
        ('{"context": "c", "choices": ["a"], "label": 0}', "at least two strings"),
        ('{"context": "c", "choices": "ab", "label": 0}', "at least two strings, is 'ab'"),
        ('{"context": "c", "choices": ["a", 1], "label": 0}', "at least two strings"),
        ('{"context": "c", "choices": ["a", " "], "label": 0}', "a choice is empty"),
        ('{"context": "c", "choices": ["a", "\\ud800"], "label": 0}', "half a surrogate pair"),
        ('{"context": "\\udc00", "choices": ["a", "b"], "label": 0}', "half a surrogate pair"),
        ('{"context": "c", "choices": ["a", "b"]}', '"label" must be the number of a choice, 0 to 1, is None'),
        ('{"context": "c", "choices": ["a", "b"], "label": 2}', "0 to 1, is 2"),
        ('{"context": "c", "choices": ["a", "b"], "label": -1}', "0 to 1, is -1"),
        ('{"context": "c", "choices": ["a", "b"], "label": true}', "0 to 1, is True"),
        ('{"context": "c", "choices": ["a", "b"], "label": "a"}', "0 to 1, is 'a'"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text('{"context": "c", "choices": ["a", "b"], "label": 0}\n' + line + "\n")
    with pytest.raises(TextError) as caught:
        read_questions(tmp_path / "t.jsonl")
    assert str(caught.value).startswith(f"{tmp_path}/t.jsonl:2: ")
    assert message in str(caught.value)


def test_a_file_without_a_question_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(TextError, match=r"t\.jsonl: no question in this file"):
        read_questions(tmp_path / "t.jsonl")
    with pytest.raises(TextError, match=r"absent\.jsonl: cannot be read"):
        read_questions(tmp_path / "absent.jsonl")


def test_the_choice_is_what_lies_behind_the_tokens_of_the_context(bytes_tokenizer):
    assert asked(bytes_tokenizer, "xa", " c", "c") == [("xa c", " c"), ("xac", "c")]
    # The context alone has 2 tokens; "a" and "b" merge across the border, and what lies behind 2 tokens is scored.
    assert asked(bytes_tokenizer, "xa", "bc", " c") == [("xabc", "c"), ("xa c", " c")]


def test_white_space_at_the_end_of_the_context_belongs_to_the_choice(bytes_tokenizer):
    # " b" is one token, which a context that ends with a space would break in two.
    assert asked(bytes_tokenizer, "x ", "b", "c") == [("x b", " b"), ("x c", " c")]
    assert asked(bytes_tokenizer, "x\n\n", "c", "d") == [("x\n\nc", "\n\nc"), ("x\n\nd", "\n\nd")]


def test_a_token_in_front_is_part_of_the_context(bytes_tokenizer):
    tokenizer = with_special(bytes_tokenizer, "<s> $A")
    assert asked(tokenizer, "", "xy", "z") == [("xy", "xy"), ("z", "z")]
    assert asked(tokenizer, "x", "y", "z") == [("xy", "y"), ("xz", "z")]


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT, CONTEXT + 1, 100])
def test_what_does_not_fit_is_cut_off_at_the_left(bytes_tokenizer, length):
    text = "".join(chr(ord("c") + i % 20) for i in range(length))
    # The model reads all tokens of a window but the last.
    assert asked(bytes_tokenizer, text, " yz", " w") == [
        ((text + choice)[-CONTEXT - 1 :], choice) for choice in (" yz", " w")
    ]


def test_a_choice_may_fill_the_context_and_no_more(bytes_tokenizer):
    assert asked(bytes_tokenizer, "xy", "z" * CONTEXT, "w")[0] == ("y" + "z" * CONTEXT, "z" * CONTEXT)
    with pytest.raises(TextError, match=r"task\.jsonl:1: choice 1 has 33 tokens, more than the model's context of 32"):
        asked(bytes_tokenizer, "xy", "w", "z" * (CONTEXT + 1))


def test_questions_that_cannot_be_scored_are_named(bytes_tokenizer):
    with pytest.raises(TextError, match=r"task\.jsonl:1: the context has no token"):
        asked(bytes_tokenizer, " ", "x", "y")
    with pytest.raises(TextError, match=r"task\.jsonl:1: choice 1 has no token of its own"):
        asked(bytes_tokenizer, "a", "x", "b")
    with pytest.raises(TextError, match=r"task\.jsonl:1: the tokenizer ends a text with a special token"):
        asked(with_special(bytes_tokenizer, "$A <s>"), "a", "x", "y")


words = st.text("bcxyz ", min_size=1, max_size=6).filter(str.strip)


@given(
    st.lists(st.tuples(words, st.lists(words, min_size=2, max_size=4), st.integers(0, 1)), min_size=2, max_size=12),
)
def test_accuracy_by_its_definition(bytes_tokenizer, rows):
    questions = [question(context, *choices, label=label) for context, choices, label in rows]
    result = score_task("words", questions, bytes_tokenizer, CONTEXT, Model())
    right, right_norm = [], []
    for context, choices, label in rows:
        sums = []
        for choice in choices:
            given_tokens = len(bytes_tokenizer.encode(context.rstrip(" ")).ids)
            sums.append(sum(Model.scores(bytes_tokenizer.encode(context + choice).ids)[given_tokens - 1 :]))
        norms = [total / len(choice.lstrip(" ")) for total, choice in zip(sums, choices, strict=True)]
        right.append(sums.index(max(sums)) == label)
        right_norm.append(norms.index(max(norms)) == label)
    count = len(rows)
    assert (result.task, result.questions) == ("words", count)
    assert (result.accuracy, result.accuracy_norm) == (np.mean(right), np.mean(right_norm))
    # The standard error of a mean: the samples' standard deviation over the root of their number.
    assert result.accuracy_stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(count))
    assert result.accuracy_norm_stderr == pytest.approx(np.std(right_norm, ddof=1) / np.sqrt(count))


def test_length_is_counted_in_bytes_from_the_first_letter(bytes_tokenizer):
    # Scores are -2 a token; "éé" has four bytes and four tokens.
    def two_a_token(windows):
        return [np.full(window.scored, -2.0) for window in windows]

    for choices, best, best_norm in (
        (("x", "yy"), 0, 0),  # -2 and -4; -2 a byte each, the first
        ((" x", "yy"), 0, 1),  # -4 and -4; -4 a byte and -2
        ((" xx", "éé"), 0, 1),  # -6 and -8; -3 a byte and -2
    ):
        result = score_task("t", [question("c", *choices, label=best)], bytes_tokenizer, CONTEXT, two_a_token)
        assert result.accuracy == 1, choices
        result = score_task("t", [question("c", *choices, label=best_norm)], bytes_tokenizer, CONTEXT, two_a_token)
        assert result.accuracy_norm == 1, choices


def test_equal_windows_are_scored_once(bytes_tokenizer):
    model = Model()
    questions = [question("x", "y", "z"), question("x", "z", "y", label=1), question("x", "z", "z")]
    result = score_task("t", questions, bytes_tokenizer, CONTEXT, model)
    assert len(model.windows) == 2
    alone = [score_task("t", [q], bytes_tokenizer, CONTEXT, Model()) for q in questions]
    assert result.accuracy == pytest.approx(np.mean([r.accuracy for r in alone]))


def test_one_question_has_no_standard_error(bytes_tokenizer):
    result = score_task("t", [question("x", "y", "z")], bytes_tokenizer, CONTEXT, Model())
    assert result.accuracy_stderr is None
    assert result.accuracy_norm_stderr is None


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_model_that_computes_nan_is_refused(bytes_tokenizer, value):
    def broken(windows):
        return [np.full(window.scored, value) for window in windows]

    with pytest.raises(NonFiniteError, match=r"task\.jsonl:1: the model's log likelihoods of the choices are"):
        score_task("t", [question("x", "y", "z")], bytes_tokenizer, CONTEXT, broken)
