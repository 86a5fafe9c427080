"""Templates that would not end, or would write without end."""

from __future__ import annotations

import time

import pytest

from runtime.text.template_sandbox import MAX_SECONDS, TemplateLimitError, compile_template, render

NESTED = "{%% for a in range(99999) %%}{%% for b in range(99999) %%}%s{%% endfor %%}{%% endfor %%}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize("source", [NESTED % "", NESTED % "x", MACRO], ids=["silent", "writing", "macro"])
def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.text.template_sandbox.MAX_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(TemplateLimitError, match="runs for more"):
        render(compile_template(source), {})
    assert time.monotonic() - began < MAX_SECONDS


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ ('x' * 10**6) * 10**6 }}",
        "{% for a in range(100) %}{{ 'x' * 10**6 }}{% endfor %}",
    ],
)
def test_nothing_grows_beyond_measure(source: str) -> None:
    with pytest.raises(TemplateLimitError):
        render(compile_template(source), {})


def test_small_products_are_fine() -> None:
    assert (
        render(compile_template("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 2.5 * 2 }}{{ [0] * 2 }}"), {}) == "ababab10245.0[0, 0]"
    )
