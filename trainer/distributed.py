"""One run on several devices: each process computes the gradients of its own rows, and all take the same step.

`torchrun` starts the processes. DDP averages gradients over them. Every parameter is on every device; the optimizers'
state, and with it Newton–Schulz, is shared out by whole matrices: the owner of a matrix updates it and sends it to the
others (stage 1 of ZeRO, arXiv 1910.02054: torch's `ZeroRedundancyOptimizer`). Without `torchrun`, nothing of this
happens.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.guard import TrainingStoppedError

LONGEST_WAIT = timedelta(days=2)
"""The others wait while process 0 prepares a corpus. A process that died is `torchrun`'s to notice, not a timeout's."""


def rank() -> int:
    """This process's number among those that share the run; number 0 writes the files and talks to the user."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """How many processes share the run."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within the block, the processes that `torchrun` started can reach each other, and have a GPU each if there are
    any and `device` (see `TrainConfig`) is not "cpu".

    An error leaves at once: the others may be waiting for this process, and `torchrun` ends them. It is no error that
    training is asked to stop: all processes stop together.

    What the block made of DDP and optimizers must be gone at its end: they hold the group, and gloo's threads end with
    the last that does. A thread wants the interpreter to give back the tensors of its last work. If DDP is the last,
    it waits for the thread and keeps the interpreter from it, for ever; if nothing is, and the interpreter ends, the
    thread ends the process by SIGABRT.
    """
    if world_size() == 1:
        yield
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Functions in these keep the group that there is when they are imported, as the default of an argument.
    for module in ("torch.distributed.nn", "torch.distributed.optim"):
        importlib.import_module(module)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=LONGEST_WAIT)
    try:
        yield
    except TrainingStoppedError as stopped:
        traceback.clear_frames(stopped.__traceback__)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def process_0_first() -> Iterator[None]:
    """The block runs in process 0, and when that is done in the others."""
    if rank() > 0:
        any_of(False)
    yield
    if rank() == 0:
        any_of(False)


def mean_of(value: float) -> float:
    """The mean of the processes' values, the same in each; not finite if one of them is not."""
    return _reduced(value, dist.ReduceOp.SUM) / world_size()


def any_of(flag: bool) -> bool:
    """Whether it is set in any process, once all have asked."""
    return _reduced(float(flag), dist.ReduceOp.MAX) > 0


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, operation)
    return shared.item()


def replicated(model: nn.Module) -> nn.Module:
    """What to call instead of `model`, so that `backward` leaves the mean of all processes' gradients."""
    return model if world_size() == 1 else DistributedDataParallel(model)


def adding_up(model: nn.Module, *, more: bool) -> AbstractContextManager[None]:
    """Within the block `backward` of what `replicated` returned adds to this process's gradients.

    Args:
        more: others of the same step follow; the one without takes the mean of all processes.
    """
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()


def sharded(
    optimizer: type[torch.optim.Optimizer], groups: Sequence[dict[str, Any]], **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer, its state shared among the processes by whole parameters, the largest first to who has least."""
    if world_size() == 1:
        return optimizer(groups, **settings)
    # Not at the top: it compiles TorchScript as it is imported, which a run of one process need not wait for.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer, **settings)


def whole_states(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The states as a run of one process has them, in process 0; nothing in the others, which must call this too."""
    if world_size() > 1:
        for optimizer in optimizers:
            optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]  # `sharded` made it
    return [optimizer.state_dict() for optimizer in optimizers] if rank() == 0 else []
