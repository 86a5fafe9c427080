"""What a page of metrics says, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values by name and labels."""


def samples_of(page: str) -> Samples:
    """Every sample of a page."""
    families = text_string_to_metric_families(page)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all samples of this name that have these labels; there must be one."""
    found = [value for (n, with_), value in samples.items() if n == name and labels.items() <= set(with_)]
    assert found, f"no sample of {name} has {labels}"
    return sum(found)


def quantile(samples: Samples, name: str, q: float) -> float:
    """As Prometheus's `histogram_quantile`: linear within a bucket."""
    buckets = sorted(
        (float(dict(labels)["le"]), n) for (sample, labels), n in samples.items() if sample == f"{name}_bucket"
    )
    rank, lower, below = q * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    raise AssertionError("a histogram without an end")
