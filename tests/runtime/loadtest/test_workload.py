"""Workloads and placements: text, shared prefixes and turns on servers that count them, and who runs on which cores."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from checkpoints import write_served
from exposition import samples_of, total
from fake_server import FakeServer
from server_process import ServerProcess, running_server

from runtime.loadtest.contender import Contender
from runtime.loadtest.generator import Load, LoadGenerator
from runtime.loadtest.load_test import LoadTest, LoadTestSettings, Placement, Target
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.progress import Progress
from runtime.loadtest.result import LoadTestResult
from runtime.loadtest.validity import invalid_side
from runtime.loadtest.workload import CHARACTERS_PER_TOKEN, Workload

BLOCK = 16
"""Tokens of a block, of which the prefix cache keeps whole ones."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with running_server(str(model)) as server:
        yield server


@pytest.fixture
def documents(tmp_path: Path) -> list[str]:
    """Of 9 to 41 words, and the file that holds them: `tmp_path`/documents.jsonl."""
    documents = [" ".join(f"word{n}of{i}" for n in range(9 + 8 * i)) for i in range(5)]
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), "utf-8")
    return documents


def test_prompts_of_text_are_beginnings_of_documents_in_whole_words(documents: list[str], tmp_path: Path) -> None:
    workload = Workload(kind="text", num_prompts=7, input_len=40, documents=(tmp_path / "documents.jsonl",))

    prompts = [turn.prompt for (turn,) in workload.conversations(100, 0)]

    room = CHARACTERS_PER_TOKEN * 40
    began = []
    for prompt in prompts:
        assert isinstance(prompt, str)
        (whole,) = (document for document in documents if document.startswith(prompt))
        words = prompt.split()
        assert words == whole.split()[: len(words)]
        assert len(prompt) <= room
        assert prompt == whole or len(" ".join(whole.split()[: len(words) + 1])) > room
        began.append(whole)
    assert max(map(len, documents)) > room > min(map(len, documents))
    assert set(began[:5]) == set(documents)  # none a second time before all had their turn
    assert began[5:] == began[:2]
    assert prompts == [turn.prompt for (turn,) in workload.conversations(100, 0)]
    assert prompts != [turn.prompt for (turn,) in workload.conversations(100, 1)]


@pytest.mark.parametrize(
    ("document", "beginning"),
    [
        ("  one two three ", "one two"),
        ("one twos", "one twos"),
        ("one twos three", "one twos"),  # the room ends where a word does
        ("one\n\ntwo three", "one\n\ntwo"),
        ("indivisible", "indivisi"),
        ("one indivisible", "one"),
    ],
)
def test_beginnings_worked_out_by_hand(document: str, beginning: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(document, "utf-8")
    workload = Workload(kind="text", num_prompts=1, input_len=2, documents=(tmp_path / "one.txt",))

    ((turn,),) = workload.conversations(100, 0)

    assert turn.prompt == beginning


def test_answers_to_text_end_where_the_model_ends_them(documents: list[str], tmp_path: Path) -> None:
    workload = Workload(kind="text", num_prompts=5, output_len=9, repeats=1, documents=(tmp_path / "documents.jsonl",))

    async def run(server: FakeServer) -> Contender:
        async with server.running(), open_session({}, 10) as session:
            endpoint = await find_endpoint(session, server.url, None, {}, {})
            contender = Contender(
                "A", server.url, endpoint, session, None, workload, 100, Progress(False), counts_energy=False
            )
            await contender.repeat(0)
            return contender

    server = FakeServer(tokens=6)
    side = asyncio.run(run(server)).side

    asked = server.bodies[-5:]
    assert {body["prompt"] for body in asked} == set(documents)
    assert all(body["max_tokens"] == 9 and "ignore_eos" not in body for body in asked)
    assert side.repeats[0].figures["total_output_tokens"] == 5 * 6
    assert list(invalid_side("A", side, workload)) == []  # fewer tokens than nine, as they may be


def cached_tokens(server: ServerProcess) -> float:
    """As the server counts them."""
    return total(samples_of(httpx.get(f"{server.url}/metrics").text), "osp_prompt_tokens_cached_total")


def loaded(server: ServerProcess, workload: Workload) -> tuple[Load, float]:
    """What came of the requests of a repeat, one after the other, and how many tokens the server's cache gave."""
    load = Load()

    async def run() -> None:
        async with open_session({}, 30) as session:
            endpoint = await find_endpoint(session, server.url, None, {}, {})
            generator = LoadGenerator(session, endpoint, prefix_cache=workload.prefix_cache, progress=lambda: None)
            await generator.run(load, workload.conversations(300, 0), [], 1, closed_loop=True)  # type: ignore[arg-type]

    before = cached_tokens(server)
    asyncio.run(run())
    assert load.errors == []
    return load, cached_tokens(server) - before


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_shared_prefix_is_computed_once_if_it_may_be(server: ServerProcess, prefix_cache: bool) -> None:
    workload = Workload(
        kind="shared-prefix", num_prompts=5, input_len=5, output_len=2, prefix_len=2 * BLOCK, prefix_cache=prefix_cache
    )

    load, cached = loaded(server, workload)

    assert [record.prompt_tokens for record in load.records] == [2 * BLOCK + 5] * 5
    assert cached == (4 * 2 * BLOCK if prefix_cache else 0)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_turns_find_what_was_said_in_the_cache_if_they_may(server: ServerProcess, prefix_cache: bool) -> None:
    workload = Workload(
        kind="multi-turn",
        num_prompts=4,
        turns=2,
        input_len=BLOCK + 3,
        output_len=BLOCK,
        seed=7,  # prompts that no other test has left in the cache
        prefix_cache=prefix_cache,
    )

    load, cached = loaded(server, workload)

    first, both = BLOCK + 3, 2 * (BLOCK + 3) + BLOCK
    assert [record.prompt_tokens for record in load.records] == [first, both] * 2
    assert [len(record.token_ids) for record in load.records] == [BLOCK] * 4
    # What was said are 35 tokens, and of the last one no key or value is there yet: two blocks are whole.
    assert cached == (2 * 2 * BLOCK if prefix_cache else 0)


def watched_run(model: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch) -> tuple[LoadTestResult, list[str]]:
    """A load test of a model beside itself, and when each side's repeat began and ended: "A on 0", "A ends"."""
    seen, repeat = [], Contender.repeat

    async def watched(self: Contender, number: int) -> None:
        assert self._process is not None
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        cores = {core for task in tasks for core in os.sched_getaffinity(int(task.name))}
        seen.append(f"{self.letter} on {sorted(cores)}")
        await repeat(self, number)
        seen.append(f"{self.letter} ends")

    monkeypatch.setattr(Contender, "repeat", watched)
    workload = Workload(num_prompts=6, input_len=8, output_len=4, warmups=1, repeats=1)
    settings = LoadTestSettings(workload, "osp bench load", placement=placement, sweep_seconds=0)
    return LoadTest([Target(str(model)), Target(str(model))], settings, Progress(False)).run(), seen


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="halves need two cores")
def test_halves_are_apart_and_under_load_at_the_same_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = watched_run(model, "halves", monkeypatch)

    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    assert seen[:2] == [f"A on {cores[:half]}", f"B on {cores[half : 2 * half]}"]
    assert set(seen[2:]) == {"A ends", "B ends"}
    assert result.B is not None
    assert result.A.threads == result.B.threads == half
    assert result.A.energy_sources == []  # a joule would be both sides'


def test_in_turns_each_has_all_cores_to_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = watched_run(model, "alternate", monkeypatch)

    cores = sorted(os.sched_getaffinity(0))
    assert seen == [f"A on {cores}", "A ends", f"B on {cores}", "B ends"]
