"""Whether a load test may be believed: what went wrong, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.loadtest.generator import Load
from runtime.loadtest.result import Side
from runtime.loadtest.workload import Workload

MOST_CPU_SHARE = 0.9
"""Of one core; a generator that needs more of it may have been the bottleneck."""

MOST_LAG_MS = 20.0
"""99th percentile of the generator's lag; a larger one is in the latencies that it reports."""


def invalid_generator(name: str, load: Load) -> Iterator[str]:
    """What is wrong with one load on the client's side."""
    if load.cpu_share > MOST_CPU_SHARE:
        yield f"{name}: the generator used {load.cpu_share:.2f} of its core, so that it may have been the bottleneck"
    if load.loop_lag_p99_ms > MOST_LAG_MS:
        yield (
            f"{name}: the generator was late by {load.loop_lag_p99_ms:.0f} ms (p99), which is in all latencies; "
            "give it a core of its own, or another machine"
        )


def invalid_repeat(name: str, load: Load) -> Iterator[str]:
    """What is wrong with the load of a repeat. In a sweep requests may fail: that is how a saturated server refuses."""
    yield from invalid_generator(name, load)
    if load.errors:
        yield f"{name}: {len(load.errors)} of {len(load.records)} requests failed; the first: {load.errors[0]}"


def invalid_side(name: str, side: Side, workload: Workload) -> Iterator[str]:
    """What is wrong with a side as a whole."""
    for difference in side.server_metrics.differences:
        yield f"{name}: the server and the client disagree: {difference}"
    answered = sum(repeat.figures["completed"] for repeat in side.repeats)
    made = sum(repeat.figures["total_output_tokens"] for repeat in side.repeats)
    if workload.kind != "text" and made != answered * workload.output_len:
        yield (
            f"{name}: answers have {made / max(answered, 1):.1f} tokens on average and not the "
            f"{workload.output_len} that were asked for; the server does not know ignore_eos, or ends answers early"
        )
    if len(side.repeats) < workload.repeats:
        yield f"{name}: {len(side.repeats)} of {workload.repeats} repeats are there"
