"""What the routes work with, and how they get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, FastAPI, Request

from runtime.server.catalog import ModelCatalog
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Context:
    """One server's settings, models and metrics."""

    settings: ServerSettings
    catalog: ModelCatalog
    telemetry: Telemetry

    def attach(self, app: FastAPI) -> None:
        """Makes this the context of the app's routes."""
        app.state.context = self


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


RouteContext = Annotated[Context, Depends(_context)]
"""The type of a route's parameter that receives the context."""
