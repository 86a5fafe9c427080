"""An application behind a real socket, in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from runtime.server.lifecycle import web_server_config
from runtime.server.settings import ServerSettings


@contextlib.contextmanager
def live(app: FastAPI, settings: ServerSettings | None = None, send_buffer: int | None = None) -> Iterator[int]:
    """Serves as `osp serve` does, and gives the port.

    Args:
        send_buffer: bytes that the kernel may hold of an answer; by default as many as it likes.
    """
    server = uvicorn.Server(web_server_config(app, settings or ServerSettings()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
