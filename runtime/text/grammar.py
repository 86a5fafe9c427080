"""Text in a form that a request demands: a JSON schema, a regular expression, a choice or a grammar.

llguidance does the work: it turns all of these into one kind of grammar and says, token by token, which may follow.
It counts its own work and gives up over what is too much, in compiling and in every step.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from runtime.text.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "choice", "grammar"]

MAX_CHARACTERS = 64 * 1024
MAX_KEYS = 2000
MAX_DEPTH = 64
_LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,  # some milliseconds, in the engine's thread
    max_lexer_states=50_000,  # up to 2 kB each
    verbose_errors=False,
)
WHITE_SPACE = r" |\n {0,24}"
"""Between the parts of JSON, by default: a space, or a new line and its indentation, as those have it who write JSON.

Any amount of it would be JSON too, and models get lost in there.
"""


class GrammarError(ValueError):
    """A demand that cannot be compiled, is too large, or that no text meets; the message says why."""


class Grammar:
    """A compiled demand, as an engine's `Guide`. Children of a request share it; one caller at a time.

    Attributes:
        text: the grammar in llguidance's own form, Lark or JSON, for engines that compile it themselves.
    """

    def __init__(self, start: LLMatcher, vocab_size: int, followed: int, text: str) -> None:
        """Takes the state before the first token, and the number of sequences that will be followed."""
        self.text = text
        self._start = start
        self._vocab_size = vocab_size
        self._capacity = followed
        # By the tokens that have led there; the one that was used last stands last.
        self._states: OrderedDict[tuple[int, ...], LLMatcher] = OrderedDict()

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow: bool [V]. See `Guide.allowed`.

        Raises:
            GrammarError: the tokens do not follow the grammar, or the step would be too much work.
        """
        state = self._state_after(tuple(token_ids))
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        if state.is_error():
            raise GrammarError(_fault(state))
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def _state_after(self, tokens: tuple[int, ...]) -> LLMatcher:
        """Usually one token further than last time. A sequence that was put off, or has left its twin, starts anew."""
        state, rest = self._states.pop(tokens, None), tokens[:0]
        if state is None:
            state, rest = self._states.pop(tokens[:-1], None), tokens[-1:]
        if state is None:
            state, rest = self._start.deep_copy(), tokens
        for token in rest:
            # Past its end a grammar takes end tokens only, and stays where it is.
            if not state.is_stopped() and not state.consume_token(token):
                raise GrammarError(_fault(state))
        self._states[tokens] = state
        if len(self._states) > self._capacity:
            self._states.popitem(last=False)
        return state


class GrammarCompiler:
    """Compiles demands for one model. Takes a moment to make; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises `GrammarError` where the model has no end token, with which to say that a text is complete."""
        ends = sorted(id for id in tokenizer.end_token_ids if id < vocab_size)
        if not ends:
            raise GrammarError("this model has no end token, and could not say when its text is complete")
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends)

    def compile(self, kind: Kind, source: Any, followed: int = 1, white_space: str | None = WHITE_SPACE) -> Grammar:
        """A guide for `followed` sequences.

        Args:
            source: by kind: a JSON schema, as JSON or as its text; a regular expression (Rust's syntax); a list of
                texts; a grammar in Lark's or GBNF's syntax.
            white_space: a regular expression for what may stand between the parts of JSON; None: nothing may.

        Raises:
            GrammarError: see there.
        """
        _check_size([source, white_space])
        try:
            grammar = _grammar(kind, source, white_space)
        except ValueError as error:
            raise GrammarError(_shortened(str(error))) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        # The first mask, too: it finds out what nothing can satisfy, and what is too much work from the start.
        if not matcher.is_error() and not any(matcher.compute_bitmask()):
            raise GrammarError("no text meets it")
        if matcher.is_error():
            raise GrammarError(_fault(matcher))
        return Grammar(matcher, self._vocab_size, followed, grammar)


class LazyCompiler:
    """A `GrammarCompiler` that is made when it is first needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._arguments = (tokenizer, vocab_size)
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def get(self) -> GrammarCompiler:
        """The compiler; raises as its constructor does."""
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(*self._arguments)
            return self._compiler


def _grammar(kind: Kind, source: Any, white_space: str | None) -> str:
    match kind:
        case "json_schema":
            overrides: Any = {"whitespace_pattern": white_space} if white_space else {"whitespace_flexible": False}
            schema = source if isinstance(source, str) else json.dumps(source)
            return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in source)
            )
        case "grammar":
            return llguidance.grammar_from("grammar", source)


def _check_size(source: Any) -> None:
    """llguidance's own limits are wide: objects with thousands of properties take it seconds."""
    characters, keys, waiting = 0, 0, [(source, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise GrammarError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            keys += len(value)
            characters += sum(map(len, value))
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        characters += 2 + (len(value) if isinstance(value, str) else 0)
        if characters > MAX_CHARACTERS or keys > MAX_KEYS:
            raise GrammarError(f"it is too large: at most {MAX_CHARACTERS} characters and {MAX_KEYS} keys are allowed")


def _fault(matcher: LLMatcher) -> str:
    text = matcher.get_error().partition("\n<non-verbose/>")[0]
    return _shortened(text) if text else f"no text meets it ({matcher.stop_reason()})"


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:299] + "…"
