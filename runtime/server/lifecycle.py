"""The life of a server process: take the port, load the model, serve, drain, leave."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import signal
import socket
from types import FrameType

import uvicorn

from runtime.server.app import create_app
from runtime.server.catalog import ModelCatalog, load_model
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry

log = logging.getLogger(__name__)

ABORT_GRACE_S = 2
"""What aborted requests get to send their last event to clients that read slowly."""

_POLL_S = 0.1  # uvicorn's own pace


class StartError(RuntimeError):
    """The server cannot listen; the message says why and what to do."""


def run_server(settings: ServerSettings) -> None:
    """Serves until SIGTERM or SIGINT, and returns when the last request is answered.

    Raises:
        StartError: the port cannot be had; known before anything is loaded.
        ModelNotFoundError, CheckpointError, TokenizerError, UnknownEngineError: see `load_model`.
    """
    with _listen(settings.host, settings.port) as listener:
        telemetry = Telemetry()
        catalog = ModelCatalog([load_model(settings, telemetry)])
        app = create_app(settings, catalog, telemetry)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout) + ABORT_GRACE_S,
        )
        _DrainingServer(config, catalog, settings.drain_timeout).run(sockets=[listener])


class _DrainingServer(uvicorn.Server):
    """uvicorn, except that a signal drains the engines and the process then ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, catalog: ModelCatalog, drain_timeout: float) -> None:
        super().__init__(config)
        self._catalog = catalog
        self._drain_timeout = drain_timeout
        self._insisted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2] if sockets else (self.config.host, self.config.port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for model in self._catalog:
            info = model.engine.info
            log.info("serving %s (%s, engine %s) at http://%s", model.name, info.precision, info.engine, address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Asks for the end; a second Ctrl-C insists. Unlike uvicorn, does not die of the signal afterwards."""
        self._insisted |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("shutting down: live requests have %g s to finish", self._drain_timeout)
        # Meanwhile uvicorn waits for the open responses. They end when the engines have finished or aborted them.
        draining = asyncio.create_task(self._catalog.shutdown(self._drain_timeout))
        closing = asyncio.create_task(super().shutdown(sockets))
        while not closing.done() and not self._insisted:
            await asyncio.wait({closing}, timeout=_POLL_S)
        if not closing.done():
            # Not by uvicorn's force_exit: that leaves at once, and nobody would tell the clients.
            await self._catalog.shutdown(drain_s=0)
            await asyncio.wait({closing}, timeout=ABORT_GRACE_S)
            closing.cancel()
        await draining
        await asyncio.wait({closing})
        if not closing.cancelled():
            closing.result()


def _listen(host: str, port: int) -> socket.socket:
    """Takes the port. Clients that connect from now on wait until the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except UnicodeError:  # what Python makes of a name that DNS could not carry
        raise StartError(f"cannot listen on {host}: no such host name") from None
    except OSError as error:
        hint = "; choose another port with --port" if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"cannot listen on {host}, port {port}: {_reason(error)}{hint}") from None


def _reason(error: OSError) -> str:
    # create_server appends the address to the text, in a form of its own.
    return (error.strerror or str(error)).partition(" (while")[0].lower()
