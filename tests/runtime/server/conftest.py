"""A tiny real checkpoint, a real server process that serves it, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from chat_checkpoint import write_chat
from checkpoints import END, SERVED_SHAPE, write_byte_level_tokenizer
from hypothesis import settings
from served_engine import DIFFERENCES, ENGINE, OPTIONS, START_S, write_model
from server_process import EVENT_A_TOKEN, ServerProcess, running_server

from runtime.text.tokenizer import Tokenizer

settings.register_profile("fuzz", max_examples=500, deadline=None)  # make test-fuzz


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """The named differences of the engine that the tests run on. One that fails no more is an error too."""
    named = DIFFERENCES.get(ENGINE, {})
    for item in items:
        if reason := named.get(item.originalname) or named.get(item.name):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", write_byte_level_tokenizer, END, **SERVED_SHAPE)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was. It must end well, too."""
    with running_server(str(checkpoint), *OPTIONS, *EVENT_A_TOKEN, start_s=START_S) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="session")
def chat_tokenizer(chat_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(chat_checkpoint)


@pytest.fixture(scope="session")
def chat_server(chat_checkpoint: Path) -> Iterator[ServerProcess]:
    """A server with a chat model, by default on the reference engine: its logits can be computed here too."""
    engine = ("--engine", "reference") if ENGINE == "auto" else OPTIONS
    with running_server(str(chat_checkpoint), *engine, *EVENT_A_TOKEN, start_s=START_S) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def chat_client(chat_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
