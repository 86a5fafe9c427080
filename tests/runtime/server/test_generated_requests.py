"""schemathesis asks the server all that its own description allows, and much that it does not, over a real socket.

Each answer is one that the description has: its status, its content type, its body, every event of a stream. What
breaks the description is refused. Nothing is a 5xx, and nothing takes longer than `HANG_S`.

The suite sends some hundreds of requests; `make test-fuzz` sends thousands, by hypothesis' profile `fuzz`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from server_process import ServerProcess, running_server

from runtime.server.app import create_app
from runtime.server.catalog import ModelCatalog
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry

HANG_S = 30
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
THOROUGH = settings.get_current_profile_name() == "fuzz"
EXAMPLES_EACH = settings.default.max_examples if THOROUGH else 40
EXAMPLES = settings(
    max_examples=EXAMPLES_EACH,
    deadline=None,
    derandomize=not THOROUGH,  # in the suite, a failure is that of a change
    suppress_health_check=list(HealthCheck),
)
DESCRIPTION = create_app(ServerSettings(), ModelCatalog(), Telemetry()).openapi()
SHORT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5, 6]},
}


def described(**configuration: Any) -> Any:
    """The API as schemathesis sees it."""
    return schemathesis.openapi.from_dict(DESCRIPTION, config=schemathesis.Config.from_dict(configuration))


API = described(phases={"coverage": {"enabled": THOROUGH}})
SOUND = described(phases={"coverage": {"enabled": False}}, generation={"mode": "positive"})


@pytest.fixture(scope="module")
def fuzzed(chat_checkpoint: Path) -> Iterator[ServerProcess]:
    """A server of its own: its end shows that nothing is stuck."""
    with running_server(str(chat_checkpoint)) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def answers() -> Iterator[Counter[str]]:
    """How often each operation has answered with which status; `make test-fuzz` shows it."""
    counts: Counter[str] = Counter()
    yield counts
    lines = [f"{count:7} {answer}" for answer, count in sorted(counts.items())]
    sys.stdout.write("\n".join(["", f"{counts.total()} requests", *lines, ""]))


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def check_events(text: str, path: str) -> None:
    """Every event is of the described form; the last one says that the stream is over."""
    *events, last = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    assert last == "[DONE]"
    content = DESCRIPTION["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    form = content["schema"]["properties"]["data"]["anyOf"][1]["contentSchema"]
    validator = jsonschema.Draft202012Validator({**form, "components": DESCRIPTION["components"]})
    for event in events:
        validator.validate(json.loads(event))


def check(case: Any, server: ServerProcess, session: requests.Session, answers: Counter[str]) -> None:
    response = case.call_and_validate(base_url=server.url, session=session, timeout=HANG_S, checks=CHECKS)
    streamed = response.headers["content-type"][0].startswith("text/event-stream")
    answers[f"{case.method} {case.operation.path} {response.status_code}{' stream' * streamed}"] += 1
    if streamed:
        check_events(response.text, case.operation.path)


@API.parametrize()
@EXAMPLES
def test_whatever_is_sent(case: Any, fuzzed: ServerProcess, session: requests.Session, answers: Counter[str]) -> None:
    check(case, fuzzed, session, answers)


@SOUND.hook
def flatmap_body(context: Any, body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A short request with some of the fields: of all sixty, there are always two that exclude each other."""
    base = SHORT[context.operation.path]
    optional = sorted(body.keys() - base.keys() - {"model"})
    kept = st.sets(st.sampled_from(optional), max_size=3) if optional else st.just(set[str]())
    streams = st.sampled_from([{}, {"stream": True}] if "max_tokens" in base else [{}])
    return st.builds(lambda names, stream: base | {name: body[name] for name in sorted(names)} | stream, kept, streams)


@SOUND.include(path=list(SHORT)).parametrize()
@EXAMPLES
def test_what_is_sound(case: Any, fuzzed: ServerProcess, session: requests.Session, answers: Counter[str]) -> None:
    check(case, fuzzed, session, answers)


def test_most_that_is_sound_is_answered(answers: Counter[str]) -> None:
    for path in SHORT:
        for form in ("", " stream") if "max_tokens" in SHORT[path] else ("",):
            assert answers[f"POST {path} 200{form}"] >= EXAMPLES_EACH // 20, answers
