"""Metrics: the page, Prometheus's own check, and whether they tell the truth."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from exposition import Samples, quantile, samples_of, total
from scripted_engine import ScriptedEngine
from scripted_server import ScriptedServer
from server_process import ServerProcess

from runtime.engine.base import EngineStats
from runtime.engine.native_library import load_library
from runtime.server.auth import ApiKeys
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def scraped(server: ScriptedServer) -> Samples:
    return samples_of(server.telemetry.exposition().decode())


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_the_page_lists_every_metric_and_its_type(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    registered = {
        (family.name + "_total" * (family.type == "counter"), family.type)
        for family in server.telemetry.metrics.registry.collect()
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == registered


def test_the_kernel_that_runs_is_named(server: ServerProcess) -> None:
    samples = samples_of(httpx.get(f"{server.url}/metrics").text)
    [labels] = [dict(labels) for name, labels in samples if name == "osp_engine_info"]
    assert (labels["model_name"], labels["precision"]) == ("tiny", "w4a4")
    if labels["engine"] == "native":
        assert labels["kernel"] in load_library().available_kernels()
    if labels["engine"] == "vllm":
        kinds = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        assert all(kind in labels["kernel"] for kind in kinds), labels["kernel"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_finds_no_fault(server: ServerProcess) -> None:
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
    httpx.get(f"{server.url}/nowhere")
    page = httpx.get(f"{server.url}/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
    assert not done.stderr + done.stdout


def test_buckets_begin_at_a_millisecond(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    run(server.post(max_tokens=5))
    for name in ("time_to_first_token", "inter_token_latency", "request_queue_time", "event_loop_lag"):
        bounds = {float(dict(labels)["le"]) for (n, labels) in scraped(server) if n == f"osp_{name}_seconds_bucket"}
        assert min(bounds) == 0.001
        assert max(bounds) == float("inf")


def test_one_request_is_counted_once_everywhere(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    assert run(server.post(prompt=[1, 2, 3], max_tokens=5)).status_code == 200
    samples = scraped(server)
    expected = {
        "osp_time_to_first_token_seconds_count": 1,
        "osp_inter_token_latency_seconds_count": 4,
        "osp_request_time_per_output_token_seconds_count": 1,
        "osp_e2e_request_latency_seconds_count": 1,
        "osp_request_queue_time_seconds_count": 1,
        "osp_request_prefill_time_seconds_count": 1,
        "osp_request_decode_time_seconds_count": 1,
        "osp_request_prompt_tokens_sum": 3,
        "osp_request_generation_tokens_sum": 5,
        "osp_request_params_max_tokens_sum": 5,
        "osp_prompt_tokens_total": 3,
        "osp_prompt_tokens_cached_total": 0,
        "osp_generation_tokens_total": 5,
        "osp_corrupted_requests_total": 0,
    }
    assert {
        name: total(samples, name, model_name="scripted", engine="scripted", precision="w4a4") for name in expected
    } == expected
    assert total(samples, "osp_request_success_total", finished_reason="length") == 1
    assert total(samples, "osp_request_success_total") == 1
    assert total(samples, "osp_engine_info", context_length="64", vocab_size="300") == 1
    # A mean of 4 times between tokens is a quarter of their sum.
    mean = total(samples, "osp_request_time_per_output_token_seconds_sum")
    assert mean == pytest.approx(total(samples, "osp_inter_token_latency_seconds_sum") / 4)
    assert mean * 4 == pytest.approx(total(samples, "osp_request_decode_time_seconds_sum"))


def test_what_the_engine_says_of_itself(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedEngine, "stats", lambda _: EngineStats(3, 4, 0.5, 6, 7, 8))
    server = ScriptedServer(tokenizer, "hello")
    samples = scraped(server)
    names = {
        "osp_num_requests_running": 3,
        "osp_num_requests_waiting": 4,
        "osp_kv_cache_usage_perc": 0.5,
        "osp_num_preemptions_total": 6,
        "osp_prefix_cache_queries_total": 7,
        "osp_prefix_cache_hits_total": 8,
    }
    assert {name: total(samples, name, model_name="scripted") for name in names} == names


def test_refusals_are_counted_by_reason(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(requests_per_minute=7, max_body_bytes=2000)
    server = ScriptedServer(tokenizer, "hello", settings, ApiKeys(["sesame"]))
    key = {"authorization": "Bearer sesame"}

    def post(headers: dict[str, str] = key, **body: Any) -> int:
        body = {"prompt": "x", "max_tokens": 1} | body
        return run(server.request("POST", "/v1/completions", headers=headers, json=body)).status_code

    statuses = [post({}), post(), post(temperature=9), post(model="no"), post(max_tokens=1000), post(user="x" * 3000)]
    server.engine.full = True
    statuses += [post()]
    server.engine.dies_after = 0
    server.engine.full = False
    statuses += [post(), post()]
    statuses += [run(server.request("GET", "/nowhere", headers=key)).status_code]
    assert statuses == [401, 200, 400, 404, 400, 413, 503, 503, 429, 404]
    samples = scraped(server)
    reasons = {dict(labels)["reason"]: value for (name, labels), value in samples.items() if "rejected_total" in name}
    assert reasons == {
        "invalid_api_key": 1,
        "bad_request": 1,
        "model_not_found": 1,
        "context_length_exceeded": 1,
        "body_too_large": 1,
        "queue_full": 1,
        "engine_dead": 1,
        "rate_limit_exceeded": 1,
        "not_found": 1,
    }
    requests = {"handler": "/v1/completions", "method": "POST"}
    assert total(samples, "osp_http_requests_total", **requests, status="200") == 1
    assert total(samples, "osp_http_requests_total", **requests, status="503") == 2
    assert total(samples, "osp_http_requests_total", handler="none", status="404") == 1  # and not by its path
    assert total(samples, "osp_http_requests_total") == len(statuses)
    assert total(samples, "osp_request_success_total", finished_reason="error") == 1  # the engine that died
    assert total(samples, "osp_request_success_total") == 2


def test_what_clients_make_up_makes_no_new_series(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    before = set(scraped(server))
    for i in range(5):
        run(server.request(f"MADE-UP-{i}", f"/made/up/{i}"))
        run(server.request("GET", f"/v1/models/made-up-{i}"))
    labels = {frozenset(with_) for _, with_ in set(scraped(server)) - before}
    assert labels == {
        frozenset({("handler", "none"), ("method", "other"), ("status", "404")}),
        frozenset({("handler", "/v1/models/{name:path}"), ("method", "GET"), ("status", "404")}),
        frozenset({("reason", "not_found")}),
        frozenset({("reason", "model_not_found")}),
    }


def test_the_process_tells_its_memory(server: ServerProcess) -> None:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    resident_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    told = total(samples_of(httpx.get(f"{server.url}/metrics").text), "process_resident_memory_bytes")
    assert told == pytest.approx(resident_kb * 1024, rel=0.1)


def test_the_lag_of_the_event_loop_is_seen(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")

    async def lag() -> Samples:
        async with server.app.router.lifespan_context(server.app):
            await asyncio.sleep(0.4)
            before = samples_of(server.telemetry.exposition().decode())
            for _ in range(3):
                time.sleep(0.3)  # what no code of the server may do
                await asyncio.sleep(0.07)
        return before

    before, after = run(lag()), scraped(server)
    assert total(before, "osp_event_loop_lag_seconds_count") >= 4
    assert quantile(before, "osp_event_loop_lag_seconds", 0.5) < 0.1
    assert 0.2 < quantile(after, "osp_event_loop_lag_seconds", 0.99) <= 0.5
