"""vLLM behind the `Engine` protocol: its scheduler, its KV cache and its sampler, in a process of their own.

A request of n sequences is n requests to vLLM, which share the prompt's blocks in its prefix cache: so each has a seed
and an end of its own. A task follows each of them and posts what it hears to the request's `Stream`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.format import CheckpointReader
from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    EngineInfo,
    EngineLostError,
    EngineStats,
    FinishReason,
    GenerationError,
    GenerationRequest,
    QueueFullError,
    RequestRejectedError,
    TokenChunk,
)
from runtime.engine.scheduler import SchedulerLimits
from runtime.engine.stream import Event, Mailroom, Stream
from runtime.engine.validation import check_request
from runtime.engine.vllm_arguments import engine_arguments, require_vllm
from runtime.engine.vllm_lifeline import lifeline
from runtime.engine.vllm_plugin import kernels_text
from runtime.engine.vllm_stats import StepRecord
from runtime.engine.vllm_translation import SequenceReader, sampling_params

log = logging.getLogger(__name__)

STOP_S = 10.0
"""What vLLM's processes get to leave, once nothing runs any more, before they are killed."""

VLLM_OWN = "vLLM's own"
"""What computes a checkpoint that is not quantized."""

_LOST = "vLLM's process has ended; the server has to be started again"


class _LiveRequest:
    """A request under way.

    Attributes:
        unfinished: indices of the sequences whose end has not been posted.
        tasks: what follows each sequence.
    """

    def __init__(self, request: GenerationRequest, stream: Stream) -> None:
        self.request = request
        self.stream = stream
        self.unfinished = set(range(request.n))
        self.tasks: list[asyncio.Task[None]] = []


class VllmEngine:
    """An `Engine` that runs a checkpoint with vLLM. `shutdown` ends vLLM's processes."""

    def __init__(
        self,
        path: Path,
        limits: SchedulerLimits | None = None,
        stream_interval_s: float = 0.0,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts vLLM on the checkpoint directory `path`; takes as long as it takes, tens of seconds.

        Args:
            limits: `max_waiting` and `step_timeout_s`; the rest is vLLM's own, see `arguments`.
            stream_interval_s: see `Mailroom`.
            arguments: vLLM's engine arguments, see `engine_arguments`.

        Raises:
            VllmUnavailableError, VllmArgumentError: see `runtime.engine.vllm_arguments`.
            CheckpointError: `path` is not a usable checkpoint.
            EngineDeadError: vLLM does not start; its own words are in the log.
        """
        require_vllm()
        reader = CheckpointReader(path)
        from vllm.v1.engine.async_llm import AsyncLLM

        self._limits = limits or SchedulerLimits()
        self._steps = StepRecord()
        configured = engine_arguments(path, arguments or {})
        try:
            with lifeline():
                self._llm: Any = AsyncLLM.from_engine_args(configured, stat_loggers=[self._steps.logger])
        except (RuntimeError, ValueError) as error:
            raise EngineDeadError(f"vLLM does not start: {error}") from error
        config = self._llm.vllm_config
        self._most_live = config.scheduler_config.max_num_seqs + self._limits.max_waiting
        self._ranks = config.scheduler_config.policy == "priority"
        self._quantized = reader.scheme is not None
        precision = reader.scheme.label if reader.scheme else str(config.model_config.dtype).removeprefix("torch.")
        self._end: int | None = self._llm.tokenizer.eos_token_id
        model = config.model_config
        self._info = EngineInfo("vllm", precision, model.max_model_len, model.get_vocab_size())
        self._mailroom = Mailroom(stream_interval_s)
        self._live: dict[str, _LiveRequest] = {}
        self._resumed = time.monotonic()  # when work last came to an idle engine
        self._draining = self._stopped = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Lock()

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return self._info

    async def start(self) -> None:
        """See `Engine.start`: asks vLLM's workers which kernels they run; the log says it too."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        try:
            async with asyncio.timeout(self._limits.step_timeout_s):
                of_workers = await self._llm.collective_rpc("osp_kernels_in_use")
        except (VllmDeadError, TimeoutError) as error:
            raise EngineDeadError("vLLM does not say which kernels it runs; its own words are in the log") from error
        kernel = kernels_text(of_workers) if self._quantized else VLLM_OWN
        self._info = replace(self._info, kernel=kernel)
        log.info("engine vllm: kernel %s", kernel)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine.generate`."""
        check_request(request, self._info)
        self._check(request)
        live = self._submit(request, [sampling_params(request, i) for i in range(request.n)])
        unfinished = request.n
        try:
            while unfinished:
                event = await live.stream.next()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            # Without effect after a last event. Otherwise the client has closed the iterator or was cancelled.
            self._forget(live)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """See `Engine.abort`."""
        if live := self._live.get(request_id):
            self._abort(live, index)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._steps.snapshot(sum(len(live.unfinished) for live in self._live.values()))

    def observe_steps(self, observer: Callable[[float, int], None]) -> None:
        """See `Engine.observe_steps`. With data parallelism, of every replica's steps."""
        self._steps.observe = observer

    async def check_health(self) -> None:
        """See `Engine.check_health`. Raises `EngineLostError` where vLLM's process has ended."""
        error = self._ailment()
        if error is not None:
            for live in list(self._live.values()):
                self._post(live, error)
                self._forget(live)
            raise error

    async def shutdown(self, drain_s: float) -> None:
        """See `Engine.shutdown`."""
        self._draining = True
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            tasks = [task for live in self._live.values() for task in live.tasks]
            for live in list(self._live.values()):
                self._abort(live)
            await asyncio.wait(tasks, timeout=1)
        async with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # or it would take the end of its process for a fault, and log it
            # Not in asyncio's own threads: there it would queue behind whatever else the process has put there.
            executor = ThreadPoolExecutor(1, "osp-vllm-stop")
            await asyncio.get_running_loop().run_in_executor(executor, self._llm.shutdown, STOP_S)
            executor.shutdown()

    # The client's side.

    def _check(self, request: GenerationRequest) -> None:
        """Refuses what vLLM, as it has been started, would do otherwise or not at all."""
        sampling = request.sampling
        if request.priority and not self._ranks:
            raise RequestRejectedError("priority needs vllm.scheduling_policy to be priority")
        if len(request.prompt_token_ids) >= self._info.context_length:
            raise RequestRejectedError("the engine vllm takes no prompt that fills the whole context")
        # Past the end of a form vLLM takes any token; and where the end may not come, nor anything else, any too.
        if sampling.guide is not None and (sampling.min_tokens or self._end not in sampling.stop_token_ids):
            raise RequestRejectedError("the engine vllm takes no form together with min_tokens, or with ignore_eos")

    def _submit(self, request: GenerationRequest, params: list[Any]) -> _LiveRequest:
        if self._draining:
            raise DrainingError("the engine is draining: it is about to shut down and takes no new requests")
        if error := self._ailment():
            raise error
        if request.request_id in self._live:
            raise RequestRejectedError(f"a request with the id {request.request_id!r} is running already")
        if request.n > self._most_live:
            raise RequestRejectedError(f"n of {request.n} is more than the {self._most_live} that run and may wait")
        sequences = sum(len(live.unfinished) for live in self._live.values())
        if sequences + request.n > self._most_live:
            raise QueueFullError(f"{sequences} sequences run or wait, of {self._most_live} that may")
        live = _LiveRequest(request, self._mailroom.open(request.request_id, request.n))
        if not self._live:
            self._resumed = time.monotonic()
        self._live[request.request_id] = live
        self._idle.clear()
        live.tasks = [asyncio.create_task(self._follow(live, i, of_child)) for i, of_child in enumerate(params)]
        return live

    def _ailment(self) -> EngineDeadError | None:
        """Why the engine cannot get on; None: it can, or it has no work."""
        if self._stopped:
            return EngineDeadError("the engine has been shut down")
        if self._llm.errored:
            return EngineLostError(_LOST)
        waited, limit = time.monotonic() - max(self._resumed, self._steps.progressed), self._limits.step_timeout_s
        if waited <= limit or not self._live:
            return None
        return EngineDeadError(f"no step has ended for {waited:.1f} s, more than step_timeout_s of {limit:g} s")

    def _abort(self, live: _LiveRequest, index: int | None = None) -> None:
        for child in sorted(live.unfinished) if index is None else live.unfinished & {index}:
            live.tasks[child].cancel()
            self._post(live, TokenChunk((), FinishReason.ABORT, child))

    def _forget(self, live: _LiveRequest) -> None:
        # The id may be another request's by now.
        if self._live.get(live.request.request_id) is live:
            del self._live[live.request.request_id]
            for task in live.tasks:
                task.cancel()
            if not self._live:
                self._idle.set()

    # vLLM's side.

    async def _follow(self, live: _LiveRequest, index: int, params: Any) -> None:
        """Posts what one sequence gets, until its end; if it is cancelled, vLLM aborts the sequence."""
        try:
            await self._run(live, index, params)
        except (EngineDeadError, GenerationError, RequestRejectedError) as error:
            self._post(live, error)
            self._forget(live)

    async def _run(self, live: _LiveRequest, index: int, params: Any) -> None:
        from vllm.exceptions import VLLMClientError, VLLMError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        request, reader = live.request, SequenceReader(live.request, index)
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=request.cache_salt)
        name = f"{request.request_id}/{index}"
        try:
            async with aclosing(self._llm.generate(prompt, params, name, priority=request.priority)) as outputs:
                async for output in outputs:
                    for chunk in reader.read(output):
                        self._post(live, chunk)
                    if index not in live.unfinished:
                        return
        except VllmDeadError as error:
            raise EngineLostError(_LOST) from error
        except (VLLMClientError, ValueError) as error:
            raise RequestRejectedError(f"vLLM does not take the request: {error}") from error
        except VLLMError as error:
            raise GenerationError(f"vLLM has failed the request: {error.__cause__ or error}") from error
        finally:
            # vLLM itself forgets to, if it is cancelled while it still hands the request over.
            if index in live.unfinished or live.tasks[index].cancelling():
                await self._llm.abort(name)

    def _post(self, live: _LiveRequest, event: Event) -> None:
        if isinstance(event, TokenChunk):
            if event.index not in live.unfinished:
                return
            if event.finish_reason is not None:
                live.unfinished.discard(event.index)
        for _ in self._mailroom.send([(live.stream, event)]):
            self._forget(live)
