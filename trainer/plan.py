"""What a run would take: parameters, memory and time, without allocating the model.

FLOPs a step: 6 for each weight of a matrix product and token (forward 2, backward 4), 12 · D · L a layer and token for
attention over a whole window (what the causal mask leaves out is counted, as usual), and Muon's Newton–Schulz steps;
with activation checkpointing the blocks' forward pass once more.
Memory on a device: parameters and gradients in float32, the optimizer's state, shared among devices, and what one
micro-batch keeps for its backward pass. The latter is an estimate: it counts the tensors that the modules keep. The
optimizer's state is shared out by whole matrices (`distributed.py`); the device that has most of it counts.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from trainer.config import ModelConfig, TrainConfig
from trainer.model import OSPModel
from trainer.optimizer import NEWTON_SCHULZ_STEPS, make_optimizers, parameter_groups

DEVICES = (1, 2, 4, 8)
UTILISATION = 0.4
"""Share of a plain matrix product's rate that a whole training step reaches: an assumption, 0.3 to 0.5 is usual."""

MEASURED_SIZE = 1024
MEASURED_S = 0.5


def make_plan(config: TrainConfig, tflops: float | None = None) -> dict[str, Any]:
    """Parameters, FLOPs, and for each number of devices memory and time.

    Args:
        tflops: what one device sustains, in 10¹² operations a second; None measures a matrix product on this machine
            and takes `UTILISATION` of it.

    Returns:
        `parameters` {role: count, "total", "exported": those of the plain Llama that comes out}, `tokens`,
        `flops_per_step`, `flops`, `tflops`, `assumed` (how tflops was had), `devices`: a list of {`devices`,
        `parameter_bytes`, `gradient_bytes`, `optimizer_bytes`, `activation_bytes`, `bytes` (on each device), `hours`}.
    """
    with torch.device("meta"):
        model = OSPModel(config.model, config.recipe)
    groups = {name: sum(p.numel() for p in group) for name, group in parameter_groups(model).items()}
    total = sum(groups.values())
    assumed = "given" if tflops is not None else f"{UTILISATION} of a matrix product measured here"
    rate = tflops if tflops is not None else UTILISATION * _measured_tflops(config.autocast)
    per_step = step_flops(model, config)
    return {
        "parameters": {**groups, "total": total, "exported": exported_parameters(config.model)},
        "tokens": config.steps * config.batch_tokens,
        "flops_per_step": per_step,
        "flops": per_step * config.steps,
        "tflops": rate,
        "assumed": assumed,
        "devices": [
            _on(devices, total, optimizer_bytes(model, config, devices), per_step, rate, config) for devices in DEVICES
        ],
    }


def _on(
    devices: int, parameters: int, optimizer: int, per_step: int, rate: float, config: TrainConfig
) -> dict[str, Any]:
    sizes = {
        "parameter_bytes": 4 * parameters,
        "gradient_bytes": 4 * parameters,
        "optimizer_bytes": optimizer,
        "activation_bytes": activation_bytes(config, devices),
    }
    seconds = per_step * config.steps / (rate * 1e12 * devices)
    return {"devices": devices, **sizes, "bytes": sum(sizes.values()), "hours": seconds / 3600}


def exported_parameters(model: ModelConfig) -> int:
    """Parameters of the plain Llama that training exports, a gain a channel in every norm."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OSPModel(model, "adam").parameters())


def step_flops(model: OSPModel, config: TrainConfig) -> int:
    """Floating-point operations of one optimizer step."""
    shape = config.model
    attention = 12 * shape.num_layers * shape.hidden_size * shape.context_length
    token = 6 * _product_weights(model) + attention
    if config.activation_checkpointing:
        # The blocks' forward pass once more, but for down_proj: nothing that the backward pass reads comes after it.
        last = shape.num_layers * shape.hidden_size * shape.intermediate_size
        token += 2 * (_product_weights(model.layers) - last) + attention // 3
    return config.batch_tokens * token + _newton_schulz_flops(model, config)


def _product_weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def _newton_schulz_flops(model: OSPModel, config: TrainConfig) -> int:
    flops = 0
    for optimizer in make_optimizers(model, config):
        if not isinstance(optimizer, torch.optim.AdamW):
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                short, long = sorted(parameter.shape)
                # X Xᵀ, its square, and a matrix times X.
                flops += NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)
    return flops


def optimizer_bytes(model: OSPModel, config: TrainConfig, devices: int = 1) -> int:
    """State of the recipe's optimizers on the device that holds most, in float32: one moment for Muon, two for Adam."""
    held = [0] * devices
    for optimizer in make_optimizers(model, config):
        counts = [0] * devices
        for group in optimizer.param_groups:
            for count in sorted((parameter.numel() for parameter in group["params"]), reverse=True):
                counts[counts.index(min(counts))] += count
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
        held = [size + 4 * moments * count for size, count in zip(held, counts, strict=True)]
    return max(held)


def activation_bytes(config: TrainConfig, devices: int = 1) -> int:
    """What the micro-batch of one device keeps for its backward pass, about.

    A block keeps, a token: the residual stream twice and both norms' outputs in float32; q, k and v twice (before and
    after the rotary embedding), the attention's output, gate, up, silu(gate) and their product in the type of the
    matrix products. The logits are kept three times in float32. With activation checkpointing a block keeps what enters
    it, in float32, and one at a time keeps all.
    """
    shape, compute = config.model, 2 if config.autocast else 4
    tokens = max(shape.context_length, min(config.micro_batch_tokens, config.batch_tokens // devices))
    block = 4 * 4 * shape.hidden_size + compute * (7 * shape.hidden_size + 4 * shape.intermediate_size)
    if config.activation_checkpointing:
        blocks = shape.num_layers * 4 * shape.hidden_size + block
    else:
        blocks = shape.num_layers * block
    return tokens * (blocks + 3 * 4 * shape.vocab_size)


def _measured_tflops(autocast: bool) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if autocast else torch.float32
    x = torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device).to(dtype)
    _run(x, 1)  # the first product pays for what is set up once
    products, seconds = 1, 0.0
    while seconds < MEASURED_S:
        products *= 2
        seconds = _run(x, products)
    return 2 * MEASURED_SIZE**3 * products / seconds / 1e12


def _run(x: torch.Tensor, products: int) -> float:
    started = time.perf_counter()
    for _ in range(products):
        y = x @ x
    float(y[0, 0])  # waits for the device
    return time.perf_counter() - started


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as people read it."""
    parameters = plan["parameters"]
    roles = ", ".join(f"{name} {parameters[name]:,}" for name in ("matrices", "tables", "norms"))
    lines = [
        f"parameters  {parameters['total']:,} in training ({roles}); {parameters['exported']:,} exported",
        f"text        {plan['tokens']:,} tokens",
        f"work        {plan['flops']:.3g} FLOPs, {plan['flops_per_step']:.3g} a step",
        f"rate        {plan['tflops']:.3g} TFLOP/s a device ({plan['assumed']})",
        "",
        f"{'devices':>7} {'GiB on each':>12} {'of it activations':>18} {'time':>12}",
    ]
    for row in plan["devices"]:
        size, kept = row["bytes"] / 2**30, row["activation_bytes"] / 2**30
        lines.append(f"{row['devices']:>7} {size:>12.2f} {kept:>18.2f} {_duration(row['hours']):>12}")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"
