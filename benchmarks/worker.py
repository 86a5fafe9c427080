"""The worker's side of `benchmarks.peers`: a process that has one engine loaded, and is told what to measure.

Requests and replies are JSON objects, one a line, on standard input and output:

    once loaded                                                      ->  {"ready": {"engine": …}, "measures": […]}
    {"measure": "decode", "batch": 8, "context": 0, "tokens": 32}    ->  {"tok_s": 101.3}
    {"measure": "prefill", "tokens": 512}                            ->  {"tok_s": 80.2}
    {"measure": "limits"}                                            ->  {"read_GBps": 24.1, "dot_GOPS": 1254.0}
    what cannot be measured                                          ->  {"error": "what is wrong"}

The worker ends where its input ends. It imports the standard library only: it runs in environments of the peers' own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable


class Bench(Protocol):
    """An engine with a model of random weights in it. Rates are tokens a second, all sequences together."""

    def decode(self, batch: int, context: int, tokens: int) -> float:
        """Decodes `tokens` tokens in each of `batch` sequences that hold `context` tokens already."""
        ...

    def prefill(self, tokens: int) -> float:
        """Reads a prompt of `tokens` tokens, and computes the logits of the last."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


@runtime_checkable
class MachineLimits(Protocol):
    """What a bench has, too, that can measure the limits of the machine."""

    def limits(self) -> Mapping[str, float]:
        """`read_GBps`, and `dot_GOPS` of 8-bit dot products."""
        ...


class UnsupportedError(ValueError):
    """The engine does not do what is asked for; the message says what."""


def arguments(description: str) -> argparse.ArgumentParser:
    """What every worker is started with: `--shape`, `--threads`, and `--directory`, where it may keep files."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", required=True, help="a preset of trainer.config")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="where files may be kept between runs")
    return parser


def serve(load: Callable[[], Bench], about: Mapping[str, str]) -> None:
    """Loads an engine, and measures what the requests ask for, until they end.

    Args:
        about: what the first line says of the engine.
    """
    die_with_parent()
    replies = claim_stdout()
    bench = load()
    try:
        measures = ["decode", "prefill", *(["limits"] if isinstance(bench, MachineLimits) else [])]
        _say(replies, {"ready": dict(about), "measures": measures})
        for line in sys.stdin:
            _say(replies, _reply(bench, json.loads(line)))
    finally:
        bench.close()


def die_with_parent() -> None:
    """Linux ends this process where the one that started it ends, even while this one is stopped by a signal.

    Raises:
        OSError: the system refuses.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(set_parent_death_signal, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def claim_stdout() -> TextIO:
    """Standard output, for replies alone: what the engine's library prints goes to standard error from now on."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _reply(bench: Bench, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        match request["measure"]:
            case "decode":
                return {"tok_s": bench.decode(request["batch"], request["context"], request["tokens"])}
            case "prefill":
                return {"tok_s": bench.prefill(request["tokens"])}
            case "limits" if isinstance(bench, MachineLimits):
                return dict(bench.limits())
            case unknown:
                raise UnsupportedError(f"cannot measure {unknown!r}")
    except Exception as error:  # noqa: BLE001 - whatever a library raises belongs to the one who asked
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _say(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
