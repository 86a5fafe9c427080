"""The life of a server process: take the port, answer probes, load the models, serve, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from runtime.server.app import create_app
from runtime.server.auth import ApiKeyError, ApiKeys
from runtime.server.catalog import ModelCatalog, Phase, ServedModel
from runtime.server.lifecycle_reload import Reloadable, reload_on_change
from runtime.server.limits_connection import BoundedProtocol
from runtime.server.model_loading import load_models
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.server.tls import Certificate, TlsError
from runtime.server.tracing import TracingError, open_tracer

log = logging.getLogger(__name__)

ABORT_GRACE_S = 2
"""What aborted requests get to send their last event to clients that read slowly."""

KEEP_ALIVE_S = 75
"""How long a quiet connection stays open: longer than clients and load balancers keep theirs, so that it is they who
close it, and none sends a request to a server that is about to."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that wants Python's lock lets another go on with it. An engine's thread wants it between two steps,
and the processor has nothing to do meanwhile; Python's own 5 ms are several steps of a small model."""

_POLL_S = 0.1  # uvicorn's own pace


class StartError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


def run_server(settings: ServerSettings) -> None:
    """Serves until SIGTERM or SIGINT, and returns when the last request is answered.

    It listens before the models are loaded: `/health` and `/ready` answer from then on.

    Raises:
        StartError: the port cannot be had, or keys, certificate or tracing cannot be used; known before anything is
            loaded.
        ModelNotFoundError, CheckpointError, TokenizerError, UnknownEngineError and others: see `load_models`.
    """
    try:
        keys = ApiKeys((key.get_secret_value() for key in settings.api_key), settings.api_key_file)
        certificate = _certificate(settings)
        tracer = open_tracer(settings.otlp_endpoint)
    except (ApiKeyError, TlsError, TracingError) as error:
        raise StartError(str(error)) from None
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    telemetry, catalog = Telemetry(), ModelCatalog()
    with _listen(settings.host, settings.port) as listener:
        app = create_app(settings, catalog, telemetry, keys, sinks=[tracer.record] if tracer else [])
        config = web_server_config(app, settings)
        reloadables = []
        if certificate is not None:
            config.ssl = certificate.context
            reloadables.append(Reloadable("certificate", certificate.files, certificate.reload))
        if settings.api_key_file is not None:
            reloadables.append(Reloadable("API keys", (settings.api_key_file,), keys.reload))
        load = partial(load_models, settings, telemetry)
        server = _Server(config, catalog, load, settings.drain_timeout, reloadables)
        server.run(sockets=[listener])
    if tracer:
        tracer.close()
    if server.failure is not None:
        raise server.failure


def leave_threads_behind() -> None:
    """Ends the process, with exit code 0, if a thread still loads a model or hangs in a step; returns if none does.

    Such a thread cannot be ended, and the interpreter's own end would crash it in the middle of native code.
    """
    if any(thread.name.startswith(("osp-loading", "osp-engine")) for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(0)


def web_server_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn serves the application: HTTP/1.1 within limits, nothing else, and no log of its own."""
    config = uvicorn.Config(
        app,
        # The class has one more parameter than uvicorn knows of.
        http=cast(type[asyncio.Protocol], partial(BoundedProtocol, settings=settings)),
        ws="none",
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=KEEP_ALIVE_S,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        access_log=False,
    )
    config.load()
    return config


class _Server(uvicorn.Server):
    """uvicorn, except that it loads the models while it listens, and that a signal drains the engines first.

    Attributes:
        failure: why the models could not be loaded, or cannot be served any more.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        catalog: ModelCatalog,
        load: Callable[[], Iterator[ServedModel]],
        drain_timeout: float,
        reloadables: list[Reloadable],
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._catalog = catalog
        self._load = load
        self._drain_timeout = drain_timeout
        self._reloadables = reloadables
        self._insisted = False
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2] if sockets else (self.config.host, self.config.port)
        scheme = "https" if self.config.ssl else "http"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        log.info("listening at %s; loading", url)
        self._tasks.append(asyncio.create_task(self._load_models(url)))
        if self._reloadables:
            asked = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
            self._tasks.append(asyncio.create_task(reload_on_change(self._reloadables, asked)))

    async def on_tick(self, counter: int) -> bool:
        """Leaves, and says why, once an engine is lost that only another process can have anew."""
        if self._catalog.lost is not None and self.failure is None:
            self.failure = self._catalog.lost
            self.should_exit = True
        return await super().on_tick(counter)

    async def _load_models(self, url: str) -> None:
        def load_all() -> None:
            for model in self._load():
                self._catalog.add(model)

        try:
            await _in_daemon_thread(load_all)
            for model in self._catalog:
                await model.engine.start()
        except Exception as error:  # noqa: BLE001 - `run_server` raises it
            self.failure = error
            self.should_exit = True
            return
        self._catalog.phase = Phase.SERVING
        for model in self._catalog:
            info = model.engine.info
            log.info("serving %s (%s, engine %s) at %s", model.name, info.precision, info.engine, url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Asks for the end; a second Ctrl-C insists. Unlike uvicorn, does not die of the signal afterwards."""
        self._insisted |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        deadline = monotonic() + self._drain_timeout
        if self._catalog.phase is Phase.SERVING:
            log.info("shutting down: live requests have %g s to finish", self._drain_timeout)
        # Still listening: who comes now is told to come again later, by a server that is not lost yet.
        await self._unless_insisted(asyncio.create_task(self._catalog.shutdown(self._drain_timeout)))
        # What is left is to send what the engines have finished, and the errors of what they have not.
        patience = max(0.0, deadline - monotonic()) + ABORT_GRACE_S
        self.config.timeout_graceful_shutdown = math.ceil(patience)
        closing = asyncio.create_task(super().shutdown(sockets))
        await self._unless_insisted(closing)
        if not closing.done():
            await asyncio.wait({closing}, timeout=ABORT_GRACE_S)
            closing.cancel()
        await asyncio.wait({closing})
        if not closing.cancelled():
            closing.result()

    async def _unless_insisted(self, task: asyncio.Task[Any]) -> None:
        """Waits for a part of the shutdown. Once somebody insists, what still runs is aborted."""
        while not task.done() and not self._insisted:
            await asyncio.wait({task}, timeout=_POLL_S)
        if not task.done():
            # Not by uvicorn's force_exit: that leaves at once, and nobody would tell the clients.
            await self._catalog.shutdown(drain_s=0)


async def _in_daemon_thread(work: Callable[[], None]) -> None:
    """Awaits blocking work in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            work()
        except Exception as failure:  # noqa: BLE001 - handed on to whoever awaits
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits any more
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="osp-loading", daemon=True).start()
    await done


def _certificate(settings: ServerSettings) -> Certificate | None:
    if settings.tls_cert is None or settings.tls_key is None:  # the settings have checked that it is both or none
        return None
    return Certificate(settings.tls_cert, settings.tls_key)


def _listen(host: str, port: int) -> socket.socket:
    """Takes the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. asyncio would set it, but not on sockets that do not say that they speak TCP; and
        # without it each piece of an answer waits for the client to acknowledge the one before, 40 ms or so.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except UnicodeError:  # what Python makes of a name that DNS could not carry
        raise StartError(f"cannot listen on {host}: no such host name") from None
    except OSError as error:
        hint = "; choose another port with --port" if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"cannot listen on {host}, port {port}: {_reason(error)}{hint}") from None


def _reason(error: OSError) -> str:
    # create_server appends the address to the text, in a form of its own.
    return (error.strerror or str(error)).partition(" (while")[0].lower()
