"""Puts the application together: models, routes, errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from runtime.server.catalog import ModelCatalog
from runtime.server.context import Context
from runtime.server.errors import install_error_handlers
from runtime.server.routes import completions, health, metrics, models
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import ArrivalClock, Telemetry


def create_app(settings: ServerSettings, catalog: ModelCatalog, telemetry: Telemetry) -> FastAPI:
    """The application. It owns the catalog's engines from here on: its lifespan ends with their shutdown.

    Args:
        telemetry: what the catalog's models record in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # By now the web server has let the live requests finish, or has given up on them.
        await catalog.shutdown(drain_s=0)

    app = FastAPI(title="osp-runtime", version=version("osp-runtime"), lifespan=lifespan)
    Context(settings, catalog, telemetry).attach(app)
    app.add_middleware(ArrivalClock)
    install_error_handlers(app)
    for resource in (completions, models, health, metrics):
        app.include_router(resource.router)
    return app
