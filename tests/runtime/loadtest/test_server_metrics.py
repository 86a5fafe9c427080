"""The server's story beside the client's, written by Prometheus's own client."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from runtime.loadtest.record import RequestRecord
from runtime.loadtest.result import ServerAgreement
from runtime.loadtest.server_metrics import MetricsPage, compare_metrics, parse_metrics


class Server:
    """Counts requests of 10 prompt tokens and 5 new ones as a server does, for itself and for another model."""

    def __init__(self, prefix: str) -> None:
        self.registry = CollectorRegistry()
        self._counters = [
            (Counter(f"{prefix}{name}", "", ["model_name"], registry=self.registry), count)
            for name, count in (("generation_tokens", 5), ("prompt_tokens", 10), ("request_success", 1))
        ]
        name = f"{prefix}time_to_first_token_seconds"
        self._ttft = Histogram(name, "", ["model_name"], registry=self.registry)

    def serve(self, times: int, ttft_s: float, model: str = "mine") -> None:
        for _ in range(times):
            for counter, count in self._counters:
                counter.labels(model).inc(count)
            self._ttft.labels(model).observe(ttft_s)

    def page(self) -> MetricsPage:
        return parse_metrics(generate_latest(self.registry).decode(), "mine")


def seen(count: int, ttft_s: float, output_tokens: int = 5) -> list[RequestRecord]:
    return [RequestRecord(0.0, 1.0, 1.0 + ttft_s, 2.0, [], 10, output_tokens) for _ in range(count)]


def compared(records: list[RequestRecord], prefix: str = "osp_", ttft_s: float = 0.5) -> ServerAgreement:
    server, agreement = Server(prefix), ServerAgreement()
    server.serve(3, 9.0)  # the warm-up
    before = server.page()
    server.serve(4, ttft_s)
    server.serve(7, 1.0, model="another")
    compare_metrics(agreement, before, server.page(), records)
    return agreement


@pytest.mark.parametrize("prefix", ["osp_", "vllm:"])
def test_two_that_agree(prefix: str) -> None:
    agreement = compared(seen(4, 0.51), prefix)

    assert agreement.agrees is True
    assert len(agreement.checked) == 4


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (seen(4, 0.51, output_tokens=6), "osp_generation_tokens_total grew by 20, the client counted 24"),
        (seen(5, 0.51), "osp_request_success_total grew by 4, the client counted 5"),
        (seen(4, 0.9), "a mean of 500.0 ms, the client saw 900.0 ms"),
        (seen(4, 0.4), "a mean of 500.0 ms, the client saw 400.0 ms"),
    ],
    ids=["tokens", "requests", "slower", "faster than can be"],
)
def test_two_that_differ(records: list[RequestRecord], words: str) -> None:
    agreement = compared(records)

    assert agreement.agrees is False
    assert any(words in difference for difference in agreement.differences)


def test_nothing_is_compared_where_requests_failed_or_metrics_are_unknown() -> None:
    failed = [*seen(3, 0.5), RequestRecord(0.0, error="the connection failed")]

    assert compared(failed).agrees is None
    assert compared(seen(4, 0.5), prefix="other_").agrees is None
