"""Multiple-choice tasks: how they are read, put to a model and scored. No torch.

A task is a .jsonl file with a question on every line; other fields are passed over:

    {"context": "Question: What is red?\nAnswer:", "choices": [" Blood", " Grass"], "label": 0}

`label` counts from 0. A choice is what follows the context, character by character, so it usually begins with a space.

The convention is that of lm-evaluation-harness. Context and choice are encoded together, and the choice's tokens are
those beyond as many as the context alone has; white space that the context ends with counts as the choice's. A choice's
score is the sum of the log likelihoods of its tokens, and the answer is the choice with the highest: `accuracy`. For
`accuracy_norm` a score is divided by the choice's length in bytes, without the white space that it begins with. What
does not fit into the model's context is cut off at the left. Text is encoded by the tokenizer as it stands, so that a
beginning-of-sequence token is there where the tokenizer adds one, as in `quant.text`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.arithmetic import NonFiniteError
from quant.text import TextError, json_lines, require_unicode, text_field


class ScoredWindow(NamedTuple):
    """Token ids [L], of which the last `scored` are to be scored, each given all before it; 1 <= scored < L.

    A model reads all but the last: L - 1 is at most its context.
    """

    token_ids: tuple[int, ...]
    scored: int


LogLikelihoods = Callable[[Iterable[ScoredWindow]], Iterable[NDArray[np.float64]]]
"""Of each window, in order, the log likelihoods of its scored tokens in nats, [scored].

Windows side by side that differ in their last token only, such as those of choices " A" to " D", should be run once.
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A context, at least two ways to go on, and which of them is right; `where` is its "FILE:LINE"."""

    context: str
    choices: tuple[str, ...]
    label: int
    where: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Shares of right answers, 0 to 1, with their standard errors sqrt(p (1 - p) / (n - 1)): None for one question."""

    task: str
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float
    accuracy_norm_stderr: float | None
    questions: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a task.

    Raises:
        TextError: the file cannot be read or holds no question, or a line is not a question; the message names it.
    """
    questions = [_question(where, record) for where, record in json_lines(path)]
    if not questions:
        raise TextError(f"{path}: no question in this file")
    return questions


def score_task(
    task: str,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    context_length: int,
    log_likelihoods: LogLikelihoods,
) -> TaskResult:
    """Puts all questions to a model. Equal windows are scored once.

    Args:
        task: what to call it in the result.
        context_length: of the model.

    Raises:
        TextError: a context or a choice has no token of its own, or a choice does not fit into the context.
        NonFiniteError: the model computes NaN or infinities.
    """
    windows = [_windows(question, tokenizer, context_length) for question in questions]
    distinct = dict.fromkeys(window for choices in windows for window in choices)
    scores = {window: float(tokens.sum()) for window, tokens in zip(distinct, log_likelihoods(distinct), strict=True)}
    right, right_norm = 0, 0
    for question, choices in zip(questions, windows, strict=True):
        sums = np.array([scores[window] for window in choices])
        if not np.isfinite(sums).all():
            raise NonFiniteError(f"{question.where}: the model's log likelihoods of the choices are {sums.tolist()}")
        lengths = np.array([len(choice.lstrip().encode()) for choice in question.choices])
        right += int(sums.argmax()) == question.label
        right_norm += int((sums / lengths).argmax()) == question.label
    count = len(questions)
    return TaskResult(task, *_share(right, count), *_share(right_norm, count), count)


def _question(where: str, record: dict[str, Any]) -> Question:
    context, choices, label = text_field(where, record, "context"), record.get("choices"), record.get("label")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise TextError(f'{where}: "choices" must be a list of at least two strings, is {shortened(choices)}')
    for choice in choices:
        require_unicode(where, choice)
        if not choice.strip():
            raise TextError(f"{where}: a choice is empty")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise TextError(
            f'{where}: "label" must be the number of a choice, 0 to {len(choices) - 1}, is {shortened(label)}'
        )
    return Question(context, tuple(choices), label, where)


def _windows(question: Question, tokenizer: Tokenizer, context_length: int) -> list[ScoredWindow]:
    """One for each choice."""
    context = question.context.rstrip()
    space = question.context[len(context) :]
    given = len(tokenizer.encode(context).ids)
    if not given:
        raise TextError(
            f"{question.where}: the context has no token, and no choice can be scored without one before it"
        )
    windows = []
    for number, choice in enumerate(question.choices):
        encoding = tokenizer.encode(context + space + choice)
        if encoding.special_tokens_mask[-1:] == [1]:
            raise TextError(
                f"{question.where}: the tokenizer ends a text with a special token, behind which no choice can follow"
            )
        scored = len(encoding.ids) - given
        if scored < 1:
            raise TextError(
                f"{question.where}: choice {number} has no token of its own, as it merges into the context; begin it "
                "with a space"
            )
        if scored > context_length:
            raise TextError(
                f"{question.where}: choice {number} has {scored} tokens, more than the model's context of "
                f"{context_length}"
            )
        # The last token is only scored, not read.
        windows.append(ScoredWindow(tuple(encoding.ids[-context_length - 1 :]), scored))
    return windows


def _share(right: int, count: int) -> tuple[float, float | None]:
    """The share and its standard error."""
    p = right / count
    return p, float(np.sqrt(p * (1 - p) / (count - 1))) if count > 1 else None
