"""How much one client may ask for: requests and tokens a minute, for each API key, or each address without keys.

Token buckets: a client that was quiet for a minute may spend a minute's worth at once, and what it spends comes back
evenly. Tokens are charged as they are computed, prompt and answer; the request that overdraws the budget goes on, and
the next one waits until the debt is paid.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.errors import ApiError, send_error
from runtime.server.request_record import request_record

MAX_CLIENTS = 10_000
"""Clients that are remembered; beyond them the one that has been quiet longest is forgotten."""


class Budget:
    """So many units a minute. Not more than that are ever saved up."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        """Begins full."""
        self._capacity = float(per_minute)
        self._level = self._capacity
        self._clock = clock
        self._filled = clock()

    def spend(self, units: int) -> None:
        """Takes units out, perhaps more than there are."""
        self._refill()
        self._level -= units

    def wait_s(self) -> float:
        """Seconds until there is a whole unit; 0: there is one."""
        self._refill()
        return max(0.0, (1.0 - self._level) * 60 / self._capacity)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled) * self._capacity / 60)
        self._filled = now


class RateLimits:
    """ASGI middleware: answers 429, with `Retry-After`, to clients that have spent their requests or tokens.

    Counts POST requests: the others compute nothing.
    """

    def __init__(self, app: ASGIApp, requests_per_minute: int, tokens_per_minute: int) -> None:
        """Either limit may be 0 for none."""
        self._app = app
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._budgets: OrderedDict[str, dict[str, Budget]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through or refuses it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        record = request_record()
        budgets = self._of(f"key {record.key_name}" if record.key_name else f"address {record.client}")
        for unit, budget in budgets.items():
            if wait := budget.wait_s():
                await send_error(_refusal(unit, self._limits[unit], wait), scope, receive, send)
                return
        if "requests" in budgets:
            budgets["requests"].spend(1)
        if "tokens" in budgets:
            record.charge = budgets["tokens"].spend
        await self._app(scope, receive, send)

    def _of(self, client: str) -> dict[str, Budget]:
        if client not in self._budgets:
            self._budgets[client] = {unit: Budget(limit) for unit, limit in self._limits.items() if limit}
            if len(self._budgets) > MAX_CLIENTS:
                self._budgets.popitem(last=False)
        self._budgets.move_to_end(client)
        return self._budgets[client]


def _refusal(unit: str, limit: int, wait_s: float) -> ApiError:
    seconds = math.ceil(wait_s)
    message = f"the limit of {limit} {unit} a minute is reached; try again in {seconds} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
