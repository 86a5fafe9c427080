"""`osp bench load` as a process: whole runs, and runs that end early."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_served
from click.testing import CliRunner, Result
from fake_server import FakeServer

from runtime.cli import main
from runtime.engine.native_library import load_library

ROOT = Path(__file__).parents[3]
SMALL = ("--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4", "--num-warmups", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def heed_ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background has them, and so what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", "bench", "load", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@contextmanager
def in_background(server: FakeServer) -> Iterator[str]:
    """The URL of a server in a thread of its own."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with server.running():
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield server.url
    loop.call_soon_threadsafe(done.set)
    thread.join(10)


def test_two_checkpoints_whole(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text("Once upon a time there was a little cat. " * 10, "utf-8")

    code, out, err = run(
        str(model), str(model), *SMALL, "--repeats", "2", "--sweep-seconds", "0.2", "--quality-data", str(text),
        "--threads", "1", "--json", "--out", str(tmp_path / "out"),
    )  # fmt: skip

    result = json.loads(out)
    written = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    # A shared machine may be too busy for the times to be believed, and then it must say so; counts are always right.
    assert code == (0 if result["valid"] else 1), err
    times = ("the generator", "time_to_first_token_seconds has a mean")
    assert [reason for reason in result["invalid_reasons"] if not any(words in reason for words in times)] == []
    assert {name: result[name] for name in ("ratio", "quality", "workload")} == {
        name: written[name] for name in ("ratio", "quality", "workload")
    }
    assert result["quality"]["perplexity"]["ratio"] == 1.0
    assert result["quality"]["token_agreement"]["matching_prefix_share"] == 1.0
    for letter in "AB":
        side = written[letter]
        assert side["completed"] == 6
        assert side["total_output_tokens"] == 24
        assert side["total_input_tokens"] == 48
        assert side["weight_bytes"] == (model / "osp.safetensors").stat().st_size
        assert side["peak_rss_MB"] > 10
        if side["engine"] == "native":
            assert side["kernel"] in load_library().available_kernels()
            assert side["threads"] == 1
        assert len(side["server_metrics"]["checked"]) == 4
        assert [len(repeat["samples"]["ttft_ms"]) for repeat in side["repeats"]] == [6, 6]
        assert side["sweep"]
        assert side["saturation"]["output_throughput"] > 0
        assert "repeats" not in result[letter]
    assert result["ratio"]["output_throughput"]["low"] < result["ratio"]["output_throughput"]["high"]
    for page in ("report.html", "report.md"):
        assert (tmp_path / "out" / page).stat().st_size > 1000


def test_one_url_in_an_open_loop(tmp_path: Path) -> None:
    with in_background(FakeServer(first_s=0.01, gap_s=0.005)) as url:
        code, out, _ = run(
            url,
            *SMALL,
            "--request-rate",
            "20",
            "--repeats",
            "1",
            "--sweep-seconds",
            "0",
            "--json",
            "--out",
            str(tmp_path),
        )

    result = json.loads(out)
    assert code == (0 if result["valid"] else 1)
    assert result["B"] is None
    assert result["workload"]["request_rate"] == 20
    assert result["A"]["request_throughput"] == pytest.approx(6 / (6 / 20 + 0.025), rel=0.15)
    assert result["quality"]["unavailable"]


def test_the_key_of_a_side_is_its_own(tmp_path: Path) -> None:
    small = (*SMALL, "--repeats", "1", "--sweep-seconds", "0", "--json", "--out", str(tmp_path / "out"))

    def with_keys(url: str, **keys: str) -> Result:
        return CliRunner(env=keys).invoke(main, ["bench", "load", url, *small], prog_name="osp")

    with in_background(FakeServer(key="right")) as url:
        refused = with_keys(url, OPENAI_API_KEY="wrong")
        served = with_keys(url, OPENAI_API_KEY="wrong", OPENAI_API_KEY_A="right")

    assert refused.exit_code == 1
    assert (
        refused.stderr
        == f"Error: {url} refuses the key (HTTP 401: no such key); set OPENAI_API_KEY to one that it takes\n"
    )
    assert json.loads(served.stdout)["A"]["completed"] == 6


def test_a_server_that_cannot_tell_its_quality_is_loaded_all_the_same(tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text("Once upon a time there was a little cat.", "utf-8")
    small = (*SMALL, "--repeats", "1", "--sweep-seconds", "0", "--quality-data", str(text), "--out", str(tmp_path))
    with in_background(FakeServer()) as url:
        result = CliRunner().invoke(main, ["bench", "load", url, *small], prog_name="osp")

    assert f"quality was not measured: {url.removesuffix('/v1')}/tokenize: HTTP 404: no such route" in result.stdout
    assert json.loads((tmp_path / "result.json").read_text("utf-8"))["A"]["completed"] == 6
    assert "HTTP 404: no such route" in (tmp_path / "report.md").read_text("utf-8")


def test_a_sweep_goes_to_where_the_server_refuses_and_is_valid_all_the_same(tmp_path: Path) -> None:
    limits = ("--max-concurrency", "2", "--repeats", "1", "--sweep-seconds", "1.5", "--goodput", "ttft:60000")
    with in_background(FakeServer(first_s=0.2, room=3)) as url:
        _, out, _ = run(url, *SMALL, *limits, "--json", "--out", str(tmp_path))

    result = json.loads(out)
    refusing = [point for point in result["A"]["sweep"] if point["failed"]]
    assert refusing
    assert not any(point["meets_slo"] for point in refusing)
    assert not any("failed" in reason for reason in result["invalid_reasons"])


def test_answers_of_another_length_make_the_run_invalid(tmp_path: Path) -> None:
    with in_background(FakeServer(tokens=3)) as url:
        code, out, _ = run(url, *SMALL, "--repeats", "1", "--sweep-seconds", "0", "--json", "--out", str(tmp_path))

    assert code == 1
    assert "3.0 tokens on average and not the 4" in " ".join(json.loads(out)["invalid_reasons"])


def test_a_server_that_dies_midway_leaves_what_there_is(tmp_path: Path) -> None:
    server = FakeServer(first_s=0.05)
    # The request before the load, then warm-up and repeat one: 1 + 1 + 6.
    server.closes_after = 8
    with in_background(server) as url:
        code, out, _ = run(url, *SMALL, "--sweep-seconds", "0", "--json", "--out", str(tmp_path))

    result = json.loads(out)
    assert code == 1
    assert result["A"]["completed"] == 6
    assert any("all 6 requests failed" in reason for reason in result["invalid_reasons"])
    assert any("1 of 3 repeats" in reason for reason in result["invalid_reasons"])
    assert "not valid" in (tmp_path / "report.md").read_text("utf-8").lower()


def test_ctrl_c_leaves_what_there_is(tmp_path: Path) -> None:
    server = FakeServer(first_s=0.05)
    with in_background(server) as url:
        process = start(url, *SMALL, "--num-prompts", "20000", "--sweep-seconds", "0", "--json", "--out", str(tmp_path))
        deadline = time.monotonic() + 60
        while len(server.bodies) < 60 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    result: dict[str, Any] = json.loads(out)
    assert process.returncode == 1
    assert "interrupted by Ctrl-C" in result["invalid_reasons"]
    assert result["A"]["completed"] >= 20
    assert "Traceback" not in err
    assert (tmp_path / "result.json").exists()


def test_ctrl_c_before_anything_was_measured(tmp_path: Path) -> None:
    server = FakeServer(first_s=60)
    with in_background(server) as url:
        process = start(url, *SMALL, "--out", str(tmp_path / "out"))
        deadline = time.monotonic() + 60
        while not server.bodies and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert err.strip().endswith("Aborted!")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("http://127.0.0.1:9",), "http://127.0.0.1:9/v1 cannot be reached"),
        (
            ("demo", "--random-input-len", "500"),
            "has a context of 512 tokens, and requests with their answers have 564",
        ),
        (("demo", "--dataset-name", "text"), "give --dataset-path"),
        (("demo", "--dataset-name", "text", "--dataset-path", "/no/such"), "/no/such"),
        (("demo", "--quality-data", "/no/such"), "/no/such"),
        (("demo", "--turns", "3"), "--turns goes with --dataset-name multi-turn"),
        (("demo", "--request-rate", "0"), "--request-rate must be positive"),
        (("demo", "--goodput", "ttft:soon"), "'ttft:soon' is not ttft:MS or tpot:MS"),
        (("demo", "--extra-body", "[]"), "'[]' is no JSON object"),
        (("demo", "--placement", "halves"), "halves of the cores need two checkpoints"),
        (("demo", "--kernel", "abacus"), "`osp serve demo --port 0"),
        (("no-such-model",), "no model 'no-such-model'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_run_is_said_in_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(main, ["bench", "load", *arguments], prog_name="osp")

    assert result.exit_code in (1, 2)
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
