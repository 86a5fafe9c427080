"""A Prometheus scrapes a running server with the rules of deploy/: no panel and no alert asks for what is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from server_process import running_server

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus"
DASHBOARD = json.loads((DEPLOY / "grafana/osp.json").read_text("utf-8"))
VARIABLES = {"$__rate_interval": "20s", "$instance": ".*", "$model": ".*", "$precision": ".*"}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\b(?:osp_\w+|process_\w+|osp:\w+:\w+|up)\b")

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="no prometheus and promtool in the PATH"
)


def rules(file: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((RULES / file).read_text("utf-8"))["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def wait_for(self, expression: str, models: int = 0, seconds: float = 60) -> list[dict[str, Any]]:
        """The samples of an expression, once there are some that are numbers, of so many models at least."""
        deadline = time.monotonic() + seconds
        while True:
            found = [sample for sample in self.query(expression) if sample["value"][1] != "NaN"]
            if found and len({sample["metric"].get("precision") for sample in found}) >= models:
                return found
            assert time.monotonic() < deadline, f"{found or 'no data'}: {expression}"
            time.sleep(0.5)


def ask(url: str, stop: threading.Event) -> None:
    """One request after the other, so that scrapes meet some; a prompt that the prefix cache knows, some mistakes."""
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            for model in ("demo", "demo-16bit"):
                body = {"model": model, "prompt": "The history of the town " * 8, "max_tokens": 400, "ignore_eos": True}
                client.post("/v1/completions", json=body).raise_for_status()
            assert client.post("/v1/completions", json={"max_tokens": -1}).status_code == 400


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """The configuration of deploy/, but for the target's address and the intervals."""
    directory = tmp_path_factory.mktemp("prometheus")
    for file in ("recording.yml", "alerts.yml"):
        shutil.copy(RULES / file, directory)
    configuration = yaml.safe_load((RULES / "prometheus.yml").read_text("utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    stop = threading.Event()
    with running_server("demo", "demo-16bit", "--threads", "1") as server:
        configuration["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration), "utf-8")
        load = threading.Thread(target=ask, args=(server.url, stop))
        load.start()
        with (directory / "log").open("w+") as log:
            process = subprocess.Popen(
                [
                    *("prometheus", f"--config.file={directory / 'prometheus.yml'}"),
                    *(f"--storage.tsdb.path={directory / 'data'}", "--web.listen-address=127.0.0.1:0"),
                ],
                stderr=log,
            )
            try:
                yield Prometheus(f"http://{listening(directory / 'log')}")
            finally:
                process.terminate()
                process.wait(timeout=30)
                stop.set()
                load.join()


def listening(log: Path, seconds: float = 30) -> str:
    """The address that Prometheus's log tells."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(r'msg="Listening on" address=(\S+)', log.read_text("utf-8"))):
        assert time.monotonic() < deadline, log.read_text("utf-8")
        time.sleep(0.1)
    return found[1]


@needs_prometheus
def test_the_unit_tests_of_the_rules_pass_and_let_every_alert_fire() -> None:
    run = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yml"], cwd=RULES, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
    cases = yaml.safe_load((RULES / "alerts.test.yml").read_text("utf-8"))["tests"]
    fired = {a["alertname"] for case in cases for a in case["alert_rule_test"] if a.get("exp_alerts")}
    assert fired == {alert["alert"] for alert in ALERTS}


@needs_prometheus
def test_the_configuration_passes_promtool() -> None:
    for arguments in (("check", "config", "prometheus.yml"), ("check", "rules", "recording.yml", "alerts.yml")):
        run = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stdout + run.stderr


@needs_prometheus
def test_every_panel_has_data(prometheus: Prometheus) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression
            # A panel that compares has a line for both models.
            compares = re.search(r"by \([^)]*precision\b", expression) is not None
            prometheus.wait_for(expression, models=2 if compares else 0)


@needs_prometheus
def test_every_recording_rule_has_data(prometheus: Prometheus) -> None:
    for rule in rules("recording.yml"):
        prometheus.wait_for(rule["record"])


@needs_prometheus
def test_what_alerts_ask_for_is_there_and_none_fires_on_a_healthy_server(prometheus: Prometheus) -> None:
    for alert in ALERTS:
        prometheus.query(alert["expr"])
        selectors = re.findall(rf"({METRIC.pattern}(?:\{{[^}}]*\}})?)", alert["expr"])
        assert selectors, alert["alert"]
        for selector in selectors:
            prometheus.wait_for(selector)
    answer = httpx.get(f"{prometheus.url}/api/v1/rules", params={"type": "alert"}).json()
    evaluated = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in evaluated} == {alert["alert"]: "ok" for alert in ALERTS}
    assert not [rule["name"] for rule in evaluated if rule["state"] == "firing"]


def test_the_dashboard_is_what_grafana_takes() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    sources = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert sources == {"${datasource}"}
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used <= defined


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for p in [panel["gridPos"]]
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))


def test_every_alert_has_its_line_in_the_operations_page() -> None:
    page = (DEPLOY.parent / "docs/operations.md").read_text("utf-8")
    assert re.findall(r"^### (Osp\w+)", page, re.MULTILINE) == [alert["alert"] for alert in ALERTS]
