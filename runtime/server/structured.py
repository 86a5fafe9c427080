"""Which form a request demands of its text, compiled to a guide for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.schemas.generation import GenerationBody
from runtime.server.schemas.structured import StructuredOutputs
from runtime.text.grammar import WHITE_SPACE, Grammar, GrammarError, Kind, LazyCompiler

COMPILE_SECONDS = 2.0

_compilers: WeakKeyDictionary[ServedModel, LazyCompiler] = WeakKeyDictionary()
# Threads of its own: what takes too long cannot be stopped, and must not keep others from encoding their prompts.
_executor = ThreadPoolExecutor(2, "grammar")


@dataclass(frozen=True, slots=True)
class Demand:
    """A form, and the field of the request that asks for it."""

    param: str
    kind: Kind
    source: Any
    white_space: str | None = WHITE_SPACE


async def compile_guide(body: GenerationBody, model: ServedModel) -> Grammar | None:
    """The guide of a request; None where it leaves the form free.

    Raises:
        ApiError: 400, it asks for several forms, or for one that cannot be compiled in reasonable time.
    """
    demands = list(_demands(body))
    if not demands:
        return None
    demand = demands[0]
    if len(demands) > 1:
        message = f"{demand.param} and {demands[1].param} exclude each other: a text has one form"
        raise ApiError(400, message, param=demands[1].param)
    lazy = _compilers.setdefault(model, LazyCompiler(model.tokenizer, model.engine.info.vocab_size))
    try:
        compiler = await asyncio.to_thread(lazy.get)
        compiling = asyncio.get_running_loop().run_in_executor(
            _executor, lambda: compiler.compile(demand.kind, demand.source, body.n, demand.white_space)
        )
        return await asyncio.wait_for(compiling, COMPILE_SECONDS)
    except GrammarError as error:
        raise ApiError(400, f"{demand.param} cannot be used: {error}", param=demand.param) from error
    except TimeoutError:
        message = f"{demand.param} cannot be used: it takes more than {COMPILE_SECONDS:g} s to compile"
        raise ApiError(400, message, param=demand.param) from None


def _demands(body: GenerationBody) -> Iterator[Demand]:
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        yield Demand("response_format", "json_schema", {"type": "object"})
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError(400, "response_format.json_schema is required", param="response_format.json_schema")
        yield Demand("response_format", "json_schema", wanted.json_schema.json_schema)
    legacy: tuple[tuple[str, Kind, Any], ...] = (
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
    )
    yield from (Demand(name, kind, source) for name, kind, source in legacy if source is not None)
    if body.structured_outputs is not None:
        yield from _structured(body.structured_outputs)


def _structured(outputs: StructuredOutputs) -> Iterator[Demand]:
    white_space = None if outputs.disable_any_whitespace else outputs.whitespace_pattern or WHITE_SPACE
    forms: tuple[tuple[str, Kind, Any], ...] = (
        ("json", "json_schema", outputs.json_schema),
        ("json_object", "json_schema", {"type": "object"} if outputs.json_object else None),
        ("regex", "regex", outputs.regex),
        ("choice", "choice", outputs.choice),
        ("grammar", "grammar", outputs.grammar),
    )
    given = [(name, kind, source) for name, kind, source in forms if source is not None]
    if not given:
        message = "structured_outputs needs one of json, json_object, regex, choice and grammar"
        raise ApiError(400, message, param="structured_outputs")
    for name, kind, source in given:
        yield Demand(f"structured_outputs.{name}", kind, source, white_space)
