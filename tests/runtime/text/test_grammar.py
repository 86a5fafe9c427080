"""Grammars: what they let through is what they demand; what is too much is refused in time."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from runtime.text.grammar import Grammar, GrammarCompiler, GrammarError, Kind
from runtime.text.tokenizer import Tokenizer

END, VOCABULARY = 0, 320


@pytest.fixture(scope="module")
def compiler(byte_level_backend: Any) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer(byte_level_backend, frozenset({END})), VOCABULARY)


def sample(grammar: Grammar, seed: int, most: int = 400) -> list[int]:
    """A random walk to the end."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < most:
        allowed = np.flatnonzero(grammar.allowed(tokens))
        tokens.append(int(rng.choice(allowed)))
        if tokens[-1] == END:
            return tokens[:-1]
    raise AssertionError("no end")


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Müller", "李", "😀"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("source", [SCHEMA, json.dumps(SCHEMA)])
@pytest.mark.parametrize("white_space", [None, r" ?"])
def test_json_validates(compiler: GrammarCompiler, byte_level: Tokenizer, source: Any, white_space: str | None) -> None:
    grammar = compiler.compile("json_schema", source, white_space=white_space)
    for seed in range(10):
        text = text_of(byte_level, sample(grammar, seed))
        jsonschema.validate(json.loads(text), SCHEMA)
        assert white_space is not None or not re.search(r"\s", text)


def test_a_regular_expression_matches(compiler: GrammarCompiler, byte_level: Tokenizer) -> None:
    grammar = compiler.compile("regex", r"[0-9]{3}-(ab|cd)+é?")
    for seed in range(10):
        assert re.fullmatch(r"[0-9]{3}-(ab|cd)+é?", text_of(byte_level, sample(grammar, seed)))


def test_a_choice_is_made(compiler: GrammarCompiler, byte_level: Tokenizer) -> None:
    choices = ["yes", "no", 'say "é"\n', "😀"]
    grammar = compiler.compile("choice", choices)
    assert {text_of(byte_level, sample(grammar, seed)) for seed in range(60)} == set(choices)


@pytest.mark.parametrize("source", ['root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"'])
def test_a_grammar_is_followed(compiler: GrammarCompiler, byte_level: Tokenizer, source: str) -> None:
    grammar = compiler.compile("grammar", source)
    for seed in range(10):
        text = text_of(byte_level, sample(grammar, seed))
        depth = len(text) // 2
        assert text == "(" * depth + "x" + ")" * depth


def test_the_mask_is_a_function_of_the_tokens_alone(compiler: GrammarCompiler) -> None:
    shared, tokens = compiler.compile("json_schema", SCHEMA, followed=3), {}
    for seed in range(3):
        tokens[seed] = sample(compiler.compile("json_schema", SCHEMA), seed)
    # In turns, as the children of a request are, and one of them from the start again.
    for length in range(max(map(len, tokens.values())) + 1):
        for seed in (0, 1, 2, 1):
            prefix = tokens[seed][:length]
            alone = compiler.compile("json_schema", SCHEMA)
            np.testing.assert_array_equal(shared.allowed(prefix), alone.allowed(prefix))


def test_after_its_end_only_the_end_may_come(compiler: GrammarCompiler, byte_level: Tokenizer) -> None:
    grammar = compiler.compile("choice", ["a"])
    [letter] = byte_level.encode("a")
    for tokens in ([letter], [letter, END], [letter, END, END]):
        assert np.flatnonzero(grammar.allowed(tokens)).tolist() == [END]


def test_tokens_that_do_not_follow_it_are_an_error(compiler: GrammarCompiler, byte_level: Tokenizer) -> None:
    with pytest.raises(GrammarError):
        compiler.compile("choice", ["a"]).allowed(byte_level.encode("b"))


DEEP: Any = {}
for _ in range(200):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", False),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"type": "nosuch"}),
        ("json_schema", {"$ref": "http://example.com/schema.json"}),
        ("json_schema", {"not": {}}),
        ("json_schema", {"enum": []}),
        ("json_schema", {"pattern": "(?=x)", "type": "string"}),
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", DEEP),
        ("json_schema", {"properties": {f"p{i}": {} for i in range(5000)}}),
        ("json_schema", {"enum": ["x" * 70_000]}),
        ("json_schema", {"\ud800": 1, "enum": ["\ud800"]}),
        ("regex", "["),
        ("regex", "(" * 3000 + "a" + ")" * 3000),
        ("regex", r"(a)\1"),
        ("regex", "a" * 70_000),
        ("choice", ["\ud800"]),
        ("choice", ["x"] * 40_000),
        ("grammar", "root ::= " + "(" * 5000),
        ("grammar", "root ::= nosuch"),
        ("grammar", "[" * 60_000),
        ("grammar", ""),
    ],
    ids=range(23),
)
def test_what_cannot_be_is_refused_in_time(compiler: GrammarCompiler, kind: Kind, source: Any) -> None:
    began = time.process_time()
    with pytest.raises(GrammarError) as caught:
        compiler.compile(kind, source)
    assert time.process_time() - began < 2
    assert 0 < len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a*)*b"),
        ("regex", "(x+x+)+y"),
        ("regex", "b?a{1000000000}"),
        ("regex", "(a{1,1000}){1,1000}"),
        ("regex", ".*a.{500}"),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1900)}}),
        ("json_schema", {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}),
        ("grammar", 'start: a*\na: b*\nb: "x" | a a'),
    ],
    ids=range(8),
)
def test_hard_demands_take_bounded_steps(compiler: GrammarCompiler, kind: Kind, source: Any) -> None:
    """They may be refused, also on the way. They may not take long."""
    rng, tokens = np.random.default_rng(0), list[int]()
    began = time.process_time()
    try:
        grammar = compiler.compile(kind, source)
        assert time.process_time() - began < 2
        for _ in range(30):
            began = time.process_time()
            allowed = np.flatnonzero(grammar.allowed(tokens))
            assert time.process_time() - began < 0.5
            tokens.append(int(rng.choice(allowed)))
    except GrammarError:
        assert time.process_time() - began < 2


def test_a_model_without_an_end_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="no end token"):
        GrammarCompiler(byte_level, VOCABULARY)
