"""Puts the application together: models, routes, and the layers around them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from runtime.engine.base import EngineDeadError
from runtime.server.access_log import log_request
from runtime.server.auth import PROBES, ApiKeys, Authentication
from runtime.server.catalog import ModelCatalog
from runtime.server.context import Context
from runtime.server.errors import install_error_handlers
from runtime.server.headers import SecurityHeaders, cors_options
from runtime.server.limits import RateLimits
from runtime.server.middleware import RecordSink, RequestScope, SizeLimits
from runtime.server.openapi import install_openapi
from runtime.server.routes import chat, completions, docs, health, metrics, models, playground, tokenize, version
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.server.telemetry_loop import watch_loop_lag

log = logging.getLogger(__name__)

HEALTH_CHECK_EVERY_S = 1.0


def create_app(
    settings: ServerSettings,
    catalog: ModelCatalog,
    telemetry: Telemetry,
    keys: ApiKeys | None = None,
    sinks: Sequence[RecordSink] = (),
) -> FastAPI:
    """The application. It owns the catalog's engines from here on: its lifespan ends with their shutdown.

    Args:
        telemetry: what the catalog's models record in.
        keys: who is let in; None: everybody.
        sinks: what else, beside log and metrics, is told of each request that is over.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watches = [watch_loop_lag(telemetry.metrics.loop_lag), _watch_health(catalog, settings.stall_timeout)]
        tasks = [asyncio.create_task(watch) for watch in watches]
        yield
        for task in tasks:
            task.cancel()
        # By now the web server has let the live requests finish, or has given up on them.
        await catalog.shutdown(drain_s=0)

    keys = ApiKeys() if keys is None else keys
    app = FastAPI(
        title="osp-runtime",
        version=importlib.metadata.version("osp-runtime"),
        lifespan=lifespan,
        # Theirs load scripts from elsewhere; ours is a route.
        docs_url=None,
        redoc_url=None,
        middleware=_layers(settings, telemetry, keys, sinks),
    )
    Context(settings, catalog, telemetry).attach(app)
    install_error_handlers(app)
    for resource in (completions, chat, tokenize, models, health, version, metrics, docs):
        app.include_router(resource.router)
    if settings.playground != "off":
        app.include_router(playground.router)
    install_openapi(app, keyed=bool(keys))
    return app


def _layers(
    settings: ServerSettings, telemetry: Telemetry, keys: ApiKeys, sinks: Sequence[RecordSink]
) -> list[Middleware]:
    """What every request passes on its way in, from the outside."""
    open_paths = PROBES | playground.PATHS if settings.playground == "open" else PROBES
    layers = [
        Middleware(RequestScope, sinks=[log_request, telemetry.answered, *sinks]),
        Middleware(SecurityHeaders),
        Middleware(Authentication, keys=keys, open_paths=open_paths),
        Middleware(SizeLimits, settings.max_header_bytes, settings.max_body_bytes, keep=settings.log_prompts),
    ]
    if settings.requests_per_minute or settings.tokens_per_minute:
        limits = Middleware(RateLimits, settings.requests_per_minute, settings.tokens_per_minute)
        layers.insert(3, limits)
    if settings.cors_origin:
        # Before the keys: browsers ask without one whether they may ask.
        layers.insert(2, Middleware(CORSMiddleware, **cors_options(settings.cors_origin)))
    return layers


async def _watch_health(catalog: ModelCatalog, stall_timeout: float) -> None:
    """Asks the engines how they are, also when nobody else does: sick ones fail their waiting clients when asked."""
    said = None
    while True:
        await asyncio.sleep(min(HEALTH_CHECK_EVERY_S, stall_timeout / 4))
        try:
            await catalog.check_health()
        except EngineDeadError as error:
            # A hung engine's words have a clock in them.
            if said is None:
                log.error("unhealthy: %s", error)
            said = error
        else:
            if said is not None:
                log.info("healthy again")
            said = None
