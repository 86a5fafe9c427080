"""llama.cpp as a worker: Q4_0 through the C interface of llama-cpp-python, as llama.cpp's own benchmarks call it.

Tokens are random, and none is sampled. Flash attention is on. Keys and values are float16, llama.cpp's default, where
sequences begin empty; decoding after a context has them in q8_0, which is half the bytes to read.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.random_gguf import write_random_gguf
from benchmarks.worker import arguments, serve
from trainer.config import preset

CONTEXT_LENGTH = 4096
CHUNK = 512
"""Tokens of a prompt that are computed at once; llama.cpp's default."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a llama.cpp context is made for."""

    sequences: int
    length: int
    kv_type: int


class LlamaCppError(RuntimeError):
    """A call of llama.cpp failed; the message names it."""


class LlamaCpp:
    """A model, and a context for each kind of measurement. A long context stays filled from one round to the next."""

    def __init__(self, model: Path, threads: int) -> None:
        """Loads a GGUF file.

        Raises:
            LlamaCppError: llama.cpp does not load it.
        """
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), llama_cpp.llama_model_default_params())
        if not self._model:
            raise LlamaCppError(f"llama.cpp does not load {model}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size, self._threads = llama_cpp.llama_vocab_n_tokens(vocab), threads
        self._rooms: dict[Room, Any] = {}
        self._held: dict[Room, int] = {}

    def decode(self, batch: int, context: int, tokens: int) -> float:
        """As `Bench.decode`. One step goes before, and is not timed."""
        room = self._room(batch, context + tokens + 1, llama_cpp.GGML_TYPE_Q8_0 if context else llama_cpp.GGML_TYPE_F16)
        self._hold(room, context)
        self._step(room, context)
        start = time.perf_counter()
        for position in range(context + 1, context + 1 + tokens):
            self._step(room, position)
        return batch * tokens / (time.perf_counter() - start)

    def prefill(self, tokens: int) -> float:
        """As `Bench.prefill`."""
        room = self._room(1, tokens, llama_cpp.GGML_TYPE_F16)
        self._forget(room, 0)
        start = time.perf_counter()
        self._read(room, 0, tokens)
        return tokens / (time.perf_counter() - start)

    def close(self) -> None:
        """Frees the contexts and the model."""
        for context in self._rooms.values():
            llama_cpp.llama_free(context)
        self._rooms.clear()
        llama_cpp.llama_model_free(self._model)

    def _room(self, sequences: int, length: int, kv_type: int) -> Room:
        room = Room(sequences, -(-length // 256) * 256, kv_type)
        if room not in self._rooms:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = room.sequences * room.length, room.sequences
            params.n_batch = params.n_ubatch = CHUNK
            params.n_threads = params.n_threads_batch = self._threads
            params.type_k = params.type_v = room.kv_type
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise LlamaCppError(f"llama.cpp makes no context for {room}")
            self._rooms[room], self._held[room] = context, 0
        return room

    def _hold(self, room: Room, context: int) -> None:
        """Makes every sequence of the room hold the first `context` tokens of what it was given, and no more."""
        if self._held[room] < context:
            self._forget(room, 0)
            for sequence in range(room.sequences):
                self._read(room, sequence, context)
            self._held[room] = context
        else:
            self._forget(room, context)

    def _forget(self, room: Room, keep: int) -> None:
        memory = llama_cpp.llama_get_memory(self._rooms[room])
        for sequence in range(room.sequences):
            if not llama_cpp.llama_memory_seq_rm(memory, sequence, keep, -1):
                raise LlamaCppError(f"llama_memory_seq_rm: sequence {sequence} from position {keep}")
        self._held[room] = keep

    def _read(self, room: Room, sequence: int, tokens: int) -> None:
        for start in range(0, tokens, CHUNK):
            end = min(start + CHUNK, tokens)
            places = [(sequence, position, position == tokens - 1) for position in range(start, end)]
            self._compute(room, places)

    def _step(self, room: Room, position: int) -> None:
        self._compute(room, [(sequence, position, True) for sequence in range(room.sequences)])

    def _compute(self, room: Room, places: list[tuple[int, int, bool]]) -> None:
        """Random tokens at places: sequence, position, and whether logits are wanted."""
        batch = llama_cpp.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for row, (sequence, position, wanted) in enumerate(places):
                batch.token[row] = random.randrange(self._vocab_size)
                batch.pos[row], batch.n_seq_id[row] = position, 1
                batch.seq_id[row][0], batch.logits[row] = sequence, wanted
            status = llama_cpp.llama_decode(self._rooms[room], batch)
            if status != 0:
                raise LlamaCppError(f"llama_decode: status {status} for {len(places)} tokens in {room}")
            llama_cpp.llama_synchronize(self._rooms[room])
        finally:
            llama_cpp.llama_batch_free(batch)


def main() -> None:
    """Serves measurements of llama.cpp; writes its file first, if there is none."""
    options = arguments("llama.cpp, Q4_0").parse_args()
    file = options.directory / f"{options.shape}-q4_0.gguf"
    if not file.exists():
        write_random_gguf(file, preset(options.shape).model, CONTEXT_LENGTH)
    about = {
        "engine": "llama.cpp",
        "version": f"llama-cpp-python {version('llama-cpp-python')}",
        "processor": llama_cpp.llama_print_system_info().decode(),
    }
    serve(lambda: LlamaCpp(file, options.threads), about)


if __name__ == "__main__":
    main()
