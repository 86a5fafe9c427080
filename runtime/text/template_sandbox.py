"""Where chat templates run: Jinja as transformers sets it up, without a way out and with an end.

A template comes with a checkpoint, and its variables from clients. It gets plain data, may change none of it
(`ImmutableSandboxedEnvironment`), and is stopped when it has run for too long or has written too much. What runs
without writing is loops and macros, so each turn of a loop and each call of a macro looks at the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0
MAX_CHARACTERS = 4_000_000
_TICK = "osp_tick"


class TemplateLimitError(jinja2.TemplateError):
    """A template has run for too long or has written too much."""


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the type that Jinja wants

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    # The only operators whose results can be much larger than their operands.
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Multiplies as Python does, as long as the result is not huge."""
        for sized, times in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(times, int) and len(sized) * times > MAX_CHARACTERS:
                raise TemplateLimitError(f"repeats {len(sized)} characters or items {times} times")
        if operator == "**" and not (abs(left) < 2**64 and abs(right) < 64):
            raise TemplateLimitError("raises a number to too high a power")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = []
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            blocks += tree.find_all(kind)
        for block in blocks:
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(tick, lineno=block.lineno))
        return tree


def parse(source: str) -> nodes.Template:
    """The syntax tree of a template; raises `jinja2.TemplateSyntaxError`."""
    return _SANDBOX.parse(source)


def compile_template(source: str) -> jinja2.Template:
    """A template to be given to `render`; raises `jinja2.TemplateSyntaxError`."""
    return _SANDBOX.from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """What the template writes.

    Raises:
        jinja2.TemplateError, and whatever else a template can run into: its fault, or that of the variables.
    """
    pieces, characters = [], 0
    tick = _deadline(time.monotonic() + MAX_SECONDS)
    for piece in template.generate({**variables, _TICK: tick}):
        characters += len(piece)
        if characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"writes more than {MAX_CHARACTERS} characters")
        tick()
        pieces.append(piece)
    return "".join(pieces)


def _deadline(end: float) -> Callable[[], None]:
    def tick() -> None:
        if time.monotonic() > end:
            raise TemplateLimitError(f"runs for more than {MAX_SECONDS:g} s")

    return tick


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike Jinja's own, it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_SANDBOX = _Sandbox()
