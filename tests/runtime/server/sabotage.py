"""Python code that a server process runs before anything else, to be slow, to die or to hang when it is told to."""

from __future__ import annotations

SLOW_LOADING = """
import time, runtime.server.model_loading as loading
load_engine = loading.load_engine
loading.load_engine = lambda *arguments: (time.sleep({seconds}), load_engine(*arguments))[1]
"""

STEPS = """
import os, signal, threading, time
from runtime.engine.reference import ReferenceRunner
healthy, step = ReferenceRunner.step, {{"does": "work"}}
def sabotaged(self, batch):
    time.sleep({seconds})
    if step["does"] == "die":
        raise MemoryError("a test has killed the engine")
    while step["does"] == "hang":
        time.sleep(0.01)
    return healthy(self, batch)
ReferenceRunner.step = sabotaged
signal.signal(signal.SIGUSR1, lambda *_: step.update(does="die"))
signal.signal(signal.SIGUSR2, lambda *_: step.update(does="work" if step["does"] == "hang" else "hang"))
"""
"""The reference engine takes longer for its steps; SIGUSR1 kills it, SIGUSR2 makes it hang, and again go on."""
