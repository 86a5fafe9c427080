from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.text.stop import StopMatcher


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads the whole text character by character; ends where it first ends with a stop string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    return "".join(matcher.push(piece) for piece in pieces) + matcher.flush(), matcher.matched


# Few letters, so that partial and overlapping matches are the rule.
letters = st.text(alphabet="abé", max_size=12)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=4))
def test_any_cutting_gives_what_a_search_of_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == naive("".join(pieces), stops)


@given(text=letters, stops=st.lists(letters.filter(bool), max_size=4))
def test_holds_back_a_proper_prefix_of_a_stop_string_and_no_more(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert shown + held == text
        assert held == "" or any(stop != held and stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["one S", "T", "OP two"], ["STOP"], "one "),
        (["a STO"], ["STOP"], "a STO"),
        (["abc", "d"], ["abcd", "bc"], "a"),
        (["\n", "\nx"], ["\n\n"], ""),
        (["text"], [], "text"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], text: str) -> None:
    assert run(pieces, stops)[0] == text
