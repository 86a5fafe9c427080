"""Where a run computes, and in which type: the device, bfloat16 products where it has them, and the loss there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from trainer.checkpoints import TrainingError
from trainer.config import ConfigError, TrainConfig


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, and the type that matrix products are computed in there; parameters stay float32.

    Under `torchrun` each process has a device of its own, see `distributed.process_group`.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def chosen(cls, config: TrainConfig) -> Compute:
        """What `config.device` and `config.autocast` come to on this machine; "auto" takes a GPU if there is one.

        A GPU that computes bfloat16 only by emulation gets float32: emulated products are slower than those.

        Raises:
            ConfigError: a GPU is asked for, and torch finds none.
        """
        has_gpu = torch.cuda.is_available()
        if config.device == "cuda" and not has_gpu:
            raise ConfigError("device cuda: torch finds no GPU here; use --device cpu, or a build of torch with CUDA")
        if config.device == "cpu" or not has_gpu:
            return cls(torch.device("cpu"), torch.bfloat16 if config.autocast else torch.float32)
        bfloat16 = config.autocast and torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, torch.bfloat16 if bfloat16 else torch.float32)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, products in {str(self.dtype).removeprefix('torch.')}"

    def loss(self, model: nn.Module, windows_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, nats, over windows [B, L + 1] wherever they lie; a float32 scalar.

        Raises:
            TrainingError: `compiled` made the model, and it cannot be compiled here.
        """
        windows_BL = windows_BL.to(self.device)
        try:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits_BLV = model(windows_BL[:, :-1])
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"the model cannot be compiled here ({reason}); train without --compile") from error
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), windows_BL[:, 1:].flatten())


def use_deterministic_algorithms() -> None:
    """From here on torch computes the same bits in every run, or raises RuntimeError where it has no way to.

    To be called before anything is computed on a GPU: cuBLAS reads its setting when it is first used in a process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for; :16:8 is as good
    torch.use_deterministic_algorithms(True)


def compiled(model: nn.Module) -> nn.Module:
    """`model`, with the same parameters, through torch.compile, which does its work when the result is called."""
    return cast(nn.Module, torch.compile(model))
