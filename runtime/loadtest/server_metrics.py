"""A server's own `/metrics`, before and after a load: whether they tell the same story as the client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from runtime.loadtest.record import RequestRecord
from runtime.loadtest.result import ServerAgreement

PREFIXES = ("osp_", "vllm:")
"""Of the servers whose metrics are known here; behind the prefix they have the same names."""

RESIDENT = "process_resident_memory_bytes"

TTFT_SHARE, TTFT_SLACK_S = 0.1, 0.02
"""How far the client's mean TTFT may lie above the server's: the way there and back is in it, and its own queue."""

RESOLUTION_S = 0.002
"""How far below it may lie: nothing is faster than the server."""


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """The values of one page, of one model and of what has no model.

    Attributes:
        values: by name, summed over all labels.
        labels: by name, those of the first sample.
    """

    values: dict[str, float] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)


async def read_metrics(session: aiohttp.ClientSession, root: str, model: str) -> MetricsPage | None:
    """The page at `root`/metrics; None where there is none that can be read: not every server has one."""
    try:
        async with session.get(f"{root}/metrics") as response:
            return parse_metrics(await response.text(), model) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def parse_metrics(text: str, model: str) -> MetricsPage:
    """The page's samples.

    Raises:
        ValueError: it is not in Prometheus's text format.
    """
    page = MetricsPage()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("model_name", model) == model:
                page.values[sample.name] = page.values.get(sample.name, 0.0) + sample.value
                page.labels.setdefault(sample.name, sample.labels)
    return page


def compare_metrics(
    agreement: ServerAgreement, before: MetricsPage | None, after: MetricsPage | None, records: Sequence[RequestRecord]
) -> None:
    """Adds to `agreement` what the server counted between two pages, beside what the client saw.

    Counts must be equal. They are only compared where every request succeeded: of a request that failed, the two
    rightly see different parts. The mean time to first token, for the client from when it sent the request, may be a
    little more than the server's, and not less.
    """
    prefix = next((p for p in PREFIXES if after and f"{p}generation_tokens_total" in after.values), None)
    if before is None or after is None or prefix is None or not all(record.succeeded for record in records):
        return
    grown = {name: value - before.values.get(name, 0.0) for name, value in after.values.items()}
    seen = {
        "generation_tokens_total": sum(record.output_tokens for record in records),
        "prompt_tokens_total": sum(record.prompt_tokens for record in records),
        "request_success_total": len(records),
    }
    for name, count in seen.items():
        metric = prefix + name
        if metric in grown:
            _checked(agreement, metric)
            if grown[metric] != count:
                agreement.differences.append(f"{metric} grew by {grown[metric]:.0f}, the client counted {count}")
    _compare_ttft(agreement, f"{prefix}time_to_first_token_seconds", grown, records)


def _compare_ttft(
    agreement: ServerAgreement, metric: str, grown: dict[str, float], records: Sequence[RequestRecord]
) -> None:
    count = grown.get(f"{metric}_count", 0)
    waits = [record.first_s - record.sent_s for record in records if record.first_s is not None]
    if not count or not waits:
        return
    _checked(agreement, metric)
    server_s, client_s = grown[f"{metric}_sum"] / count, sum(waits) / len(waits)
    if not server_s - RESOLUTION_S <= client_s <= server_s * (1 + TTFT_SHARE) + TTFT_SLACK_S:
        agreement.differences.append(
            f"{metric} has a mean of {1000 * server_s:.1f} ms, the client saw {1000 * client_s:.1f} ms after sending"
        )


def _checked(agreement: ServerAgreement, metric: str) -> None:
    if metric not in agreement.checked:
        agreement.checked.append(metric)
