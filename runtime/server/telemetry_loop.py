"""How late the event loop is: the delay that everything else in the server has on top."""

from __future__ import annotations

import asyncio

from prometheus_client import Histogram

SAMPLE_EVERY_S = 0.05
"""Twenty samples a second: a p99 over a minute rests on twelve hundred of them."""


async def watch_loop_lag(lag: Histogram) -> None:
    """Sleeps and observes by how much it oversleeps, until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SAMPLE_EVERY_S
        await asyncio.sleep(SAMPLE_EVERY_S)
        lag.observe(max(0.0, loop.time() - due))
