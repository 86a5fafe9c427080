"""Ends vLLM's processes with the server that started them, also where it was killed and could tell them nothing.

The server starts vLLM's engine with multiprocessing, and that process its workers. A child of multiprocessing has one
end of a pipe whose other end is open for as long as the parent lives (`multiprocessing.parent_process`). The plugin,
which vLLM loads in each of them, watches it there. Linux's own means, PR_SET_PDEATHSIG, would not do: it fires when the
*thread* that started a process ends, and the thread that loads a model ends long before the server.

Out of its reach is what has not loaded the plugin: an engine that waits for the server's first word, 5 minutes at most
(vLLM's HANDSHAKE_TIMEOUT_MINS), and the coordinator of data parallelism, which never loads it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HOLDER = "OSP_VLLM_LIFELINE"
"""Environment variable: the id of the process that holds the lifeline. What it starts inherits it, and passes it on."""


@contextmanager
def lifeline() -> Iterator[None]:
    """What vLLM starts within it ends with this process; vLLM's other users start theirs as ever."""
    os.environ[_HOLDER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_HOLDER]


def hold_lifeline() -> None:
    """In a process that vLLM has started within a `lifeline`: ends it when its parent has ended. Elsewhere nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.environ.get(_HOLDER) not in (None, str(os.getpid())):
        threading.Thread(target=_end_with, args=(parent,), name="osp-lifeline", daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    # Not sys.exit, which would end this thread only; and there is nobody left to clean up for.
    os._exit(1)
