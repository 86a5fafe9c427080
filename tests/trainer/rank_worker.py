"""One process of several that share a run: `torchrun rank_worker.py DIRECTORY DATA PATH`; see test_distributed.py."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.checkpoints import checkpoints
from trainer.config import TrainConfig, preset
from trainer.data import prepare
from trainer.loop import Trainer

STEPS = 8
CONFIG: TrainConfig = preset("tiny", steps=20, micro_batch_tokens=256, newton_schulz_dtype="float32")


def state_bytes(trainer: Trainer) -> int:
    """What the optimizers of this process keep, without their counters of steps."""
    local = [getattr(optimizer, "optim", optimizer) for optimizer in trainer.optimizers]
    states = [state for optimizer in local for state in optimizer.state.values()]
    return sum(x.nbytes for state in states for name, x in state.items() if name != "step")


def gloo_threads() -> int:
    """Threads of gloo's that this process has."""
    return sum("gloo" in (task / "comm").read_text("utf-8") for task in Path("/proc/self/task").iterdir())


def runs(directory: Path, data: Path, path: Path) -> dict[str, Any]:
    streams = prepare([path], data, CONFIG, resume=True)
    fresh = Trainer.start(CONFIG, directory / "fresh", streams)
    result = {"losses": [fresh.train_step() for _ in range(STEPS)], "state_bytes": state_bytes(fresh)}
    fresh.save(1.0)
    resumed = Trainer.start(CONFIG, directory / "resumed", streams)
    resumed.restore(checkpoints(directory / "resumed")[-1])
    result["resumed_losses"] = [resumed.train_step() for _ in range(STEPS)]
    poisoned = resumed.model.lm_head.weight
    if distributed.rank() == 1:
        poisoned.register_hook(lambda gradient: gradient * float("nan"))
    before = poisoned.detach().clone()
    resumed.train_step()
    result["skipped"] = [resumed.guard.skipped, torch.equal(before, poisoned)]
    return result


def main(directory: Path, data: Path, path: Path) -> None:
    torch.set_num_threads(1)
    with distributed.process_group(CONFIG.device):
        result = runs(directory, data, path)
        result["gloo_threads"] = [gloo_threads()]
    result["gloo_threads"].append(gloo_threads())
    (directory / f"rank{distributed.rank()}.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
