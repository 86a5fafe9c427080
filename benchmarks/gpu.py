"""Does the vLLM plugin compute rightly on this card, and how fast? `python -m benchmarks.gpu`, minutes, one CUDA card.

First every product is compared with numpy's integers, bit for bit; the first that differs ends the program with 1. Then
it times the linear layers of a Llama of 1.4 billion parameters (24 layers, 2048, 5504) with codes of 4 bits and with
bfloat16, a row each for decode at several batch sizes and for prefill. It has not been run yet: no card was at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import click
import numpy as np
import torch

from quant import arithmetic
from runtime.engine.vllm_arithmetic import quantize_rows, token_scales
from runtime.engine.vllm_kernels import FusedWeight, Kernel, choose_kernel

SHAPES = {"qkv_proj": (6144, 2048), "o_proj": (2048, 2048), "gate_up_proj": (11008, 2048), "down_proj": (2048, 5504)}
"""Kind of layer -> (M, K)."""

ROWS = (1, 8, 32, 256, 2048)
REPEATS = 50


@click.command()
def gpu() -> None:
    """Check the plugin's products on this machine's CUDA card, then time them beside bfloat16."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA card")
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for kind, (outputs, columns) in SHAPES.items():
        for input_bits in (4, 8):
            if not is_exact(outputs, columns, input_bits):
                click.echo(f"{kind}: inputs of {input_bits} bits: not the specification's numbers", err=True)
                sys.exit(1)
    click.echo(
        "all products are the specification's, bit for bit\n\n| rows | W4A4, ms a model | bfloat16, ms a model |"
    )
    click.echo("|---|---|---|")
    for rows in ROWS:
        coded, plain = (
            24 * sum(timer(*shape, rows) for shape in SHAPES.values()) for timer in (time_codes, time_plain)
        )
        click.echo(f"| {rows} | {coded:.2f} | {plain:.2f} |")


def is_exact(outputs: int, columns: int, input_bits: int) -> bool:
    """Compares a layer with scales of tokens with `quant.arithmetic`, in float32."""
    rng = np.random.default_rng(columns + input_bits)
    x_NK = rng.standard_normal((33, columns)).astype(np.float32)
    codes_MK = rng.integers(-8, 8, (outputs, columns)).astype(np.int8)
    scale_M = arithmetic.round_to_bfloat16(rng.uniform(0.01, 0.1, outputs).astype(np.float32))
    expected_NM = arithmetic.quantized_linear(x_NK, None, codes_MK, scale_M, input_bits)
    kernel = choose_kernel(_weight(codes_MK, scale_M), input_bits)
    return all(
        np.array_equal(_run(kernel, torch.from_numpy(x_NK[:rows]).cuda(), input_bits).cpu().numpy(), expected_NM[:rows])
        for rows in (1, 16, 17, 33)
    )


def time_codes(outputs: int, columns: int, rows: int) -> float:
    """Milliseconds of a W4A4 layer, quantizing its inputs included."""
    codes_MK = np.random.default_rng(0).integers(-8, 8, (outputs, columns)).astype(np.int8)
    kernel = choose_kernel(_weight(codes_MK, np.full(outputs, 0.03125, np.float32)), 4)
    x_NK = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    return _milliseconds(lambda: _run(kernel, x_NK, 4))


def time_plain(outputs: int, columns: int, rows: int) -> float:
    """Milliseconds of the same layer in bfloat16."""
    weight_MK = torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16)
    x_NK = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    return _milliseconds(lambda: torch.nn.functional.linear(x_NK, weight_MK))


def _weight(codes_MK: np.ndarray, scale_M: np.ndarray) -> FusedWeight:
    stored = torch.from_numpy(arithmetic.pack(codes_MK)).cuda()
    return FusedWeight(stored, codes_MK.shape[1], 4, torch.from_numpy(scale_M).cuda())


def _run(kernel: Kernel, x_NK: torch.Tensor, bits: int) -> torch.Tensor:
    scales_N1 = token_scales(x_NK.float().abs().amax(dim=-1, keepdim=True), bits)
    codes_NK, row_scales_N1 = quantize_rows(x_NK, scales_N1, bits)
    return kernel(codes_NK, row_scales_N1, x_NK.dtype)


def _milliseconds(run: Callable[[], torch.Tensor]) -> float:
    for _ in range(5):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / REPEATS


if __name__ == "__main__":
    gpu()
