"""Do the vLLM plugin's products compute rightly on this card, and how fast? One CUDA card, minutes, where vLLM is:

    python -m benchmarks.gpu

First every kernel that can serve on the card multiplies random codes. With scales that are powers of two nothing is
rounded but the outcome, so that it must be the specification's, rounded once, bit for bit: that shows the integers.
With scales as models have them it may be the neighbouring 16-bit number, rarely. The first kernel that fails ends the
program with 1. Then all of them are timed on the linear layers of a Llama of 1.4 billion parameters (24 layers, 2048,
5504), quantizing included, beside bfloat16. A kernel that cannot serve on the card is named, with the reason.

Calls are timed as they are, without CUDA graphs: small batches take what it takes to launch them. docs/vllm-kernels.md
has the figures of an H200.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import click
import numpy as np
import torch

from quant import arithmetic
from runtime.engine.vllm_cuda import CutlassKernel, MarlinFloatKernel, MarlinKernel
from runtime.engine.vllm_kernels import CodedKernel, FusedWeight, InputScheme, IntegerKernel, Kernel

SHAPES = {"qkv_proj": (6144, 2048), "o_proj": (2048, 2048), "gate_up_proj": (11008, 2048), "down_proj": (2048, 5504)}
"""Kind of layer -> (M, K)."""

LAYERS = 24
ODD_SHAPE = (100, 96)
"""No whole tile of Marlin's: it is padded."""

CHECKED_ROWS = (1, 7, 16, 17, 64, 300)
TIMED_ROWS = {
    1: "decode, batch 1",
    8: "decode, batch 8",
    32: "decode, batch 32",
    256: "prefill, 256",
    2048: "prefill, 2048",
}
RARELY = 0.001
REPEATS = 50


@click.command()
def gpu() -> None:
    """Check the plugin's products on this machine's CUDA card, then time them beside bfloat16."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA card")
    major, minor = torch.cuda.get_device_capability()
    click.echo(f"{torch.cuda.get_device_name()}, capability {major}.{minor}, torch {torch.__version__}\n")
    dtype = torch.bfloat16 if major >= 8 else torch.float16
    wrong = [line for line in checked(dtype) if line is not None]
    if wrong:
        click.echo("\n".join(wrong), err=True)
        sys.exit(1)
    click.echo("All products are the specification's.\n")
    write_times(dtype)


def checked(dtype: torch.dtype) -> Iterator[str | None]:
    """A line for each kernel and shape that computes wrongly, None for one that is right."""
    for kind, (outputs, columns) in {**SHAPES, "odd": ODD_SHAPE}.items():
        for weight_bits, input_bits in ((4, 4), (4, 8), (8, 8)):
            rng = np.random.default_rng(columns + input_bits)
            codes_MK = _codes(rng, outputs, columns, weight_bits)
            for exact in (True, False):
                scale_M = _scales(rng, outputs, exact)
                for kernel, of in kernels(codes_MK, scale_M, weight_bits, input_bits, dtype):
                    wrong = [n for n in CHECKED_ROWS if not is_right(kernel, of, rng, n, codes_MK, scale_M, exact)]
                    click.echo(
                        f"{kind}, W{weight_bits}A{input_bits}: {kernel.name}, {of}: {'wrong' if wrong else 'right'}"
                    )
                    yield f"{kind}: {kernel.name}: wrong for {wrong} rows" if wrong else None


def kernels(
    codes_MK: np.ndarray, scale_M: np.ndarray, weight_bits: int, input_bits: int, dtype: torch.dtype
) -> Iterator[tuple[CodedKernel, torch.dtype]]:
    """All that can serve such a layer on this card, each with the number type of its outputs."""
    weight, inputs = _weight(codes_MK, scale_M, weight_bits), InputScheme(input_bits)
    yield IntegerKernel(weight, inputs), torch.float32
    kind: type[MarlinKernel | CutlassKernel] = MarlinKernel if weight_bits == 4 else CutlassKernel
    obstacle = kind.obstacle(weight, dtype, torch.cuda.get_device_capability())
    if obstacle is None:
        yield kind(weight, inputs, dtype), dtype
    else:
        click.echo(f"{kind.name} cannot serve {weight.outputs} x {weight.columns} here: {obstacle}")


def is_right(
    kernel: CodedKernel,
    dtype: torch.dtype,
    rng: np.random.Generator,
    rows: int,
    codes_MK: np.ndarray,
    scale_M: np.ndarray,
    exact: bool,
) -> bool:
    """Compares random rows, one of which is lost, with the specification.

    Args:
        exact: are all scales powers of two?
    """
    x_NK, row_N1 = _codes(rng, rows, codes_MK.shape[1], kernel.inputs.bits), _scales(rng, rows, exact)[:, None]
    row_N1[rows // 2] = np.nan
    sums_NM = torch.from_numpy(x_NK).double().cuda() @ torch.from_numpy(codes_MK).double().cuda().T
    scales = torch.from_numpy(row_N1).cuda() * torch.from_numpy(scale_M).cuda()
    expected = (sums_NM.float() * scales).to(dtype)
    y = kernel.multiply(torch.from_numpy(x_NK).cuda(), torch.from_numpy(row_N1).cuda(), dtype)
    if not torch.equal(y.isnan(), expected.isnan()):
        return False
    y, expected, sums = y.nan_to_num().double(), expected.nan_to_num().double(), sums_NM.abs() * scales.nan_to_num()
    if exact or dtype is torch.float32:
        return torch.equal(y, expected)
    step = (
        torch.finfo(dtype).eps * sums
        + torch.finfo(torch.float32).eps * _magnitudes(x_NK, codes_MK) * scales.nan_to_num()
    )
    return bool(((y - expected).abs() <= step).all()) and float((y != expected).double().mean()) <= RARELY


def write_times(dtype: torch.dtype) -> None:
    """A table: milliseconds of all linear layers of the model, by kernel and by rows."""
    rng = np.random.default_rng(0)
    layers = {shape: _codes(rng, *shape, 4) for shape in SHAPES.values()}
    columns: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {f"{dtype}".removeprefix("torch."): []}
    for shape, codes_MK in layers.items():
        plain_MK = torch.randn(shape, device="cuda", dtype=dtype)
        columns[next(iter(columns))].append(lambda x, w=plain_MK: torch.nn.functional.linear(x, w))  # type: ignore[misc]
        for kernel in timed_kernels(codes_MK, dtype):
            columns.setdefault(kernel.name, []).append(lambda x, k=kernel: k(x, dtype))  # type: ignore[misc]
    served = {name: runs for name, runs in columns.items() if len(runs) == len(layers)}
    click.echo(f"| ms a model of {LAYERS} layers | {' | '.join(served)} |\n|---|{'---|' * len(served)}")
    for rows, name in TIMED_ROWS.items():
        inputs = [torch.randn(rows, columns, device="cuda", dtype=dtype) for _, columns in SHAPES.values()]
        times = [LAYERS * sum(map(_milliseconds, runs, inputs)) for runs in served.values()]
        click.echo(f"| {name} | {' | '.join(f'{time:.2f}' for time in times)} |")


def timed_kernels(codes_MK: np.ndarray, dtype: torch.dtype) -> Iterator[Kernel]:
    """For a W4A4 layer; and CUTLASS with the weights widened to 8 bits, and W4A16, for comparison."""
    scale_M = np.full(len(codes_MK), 0.03125, np.float32)
    capability, inputs = torch.cuda.get_device_capability(), InputScheme(4, torch.tensor([0.5], device="cuda"))
    four, eight = (_weight(codes_MK, scale_M, bits) for bits in (4, 8))
    if MarlinKernel.obstacle(four, dtype, capability) is None:
        yield MarlinKernel(four, inputs, dtype)
        yield MarlinFloatKernel(four, InputScheme(16), dtype)
    if CutlassKernel.obstacle(eight, dtype, capability) is None:
        yield CutlassKernel(eight, inputs, dtype)
    yield IntegerKernel(four, inputs)


def _codes(rng: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    lowest, highest = arithmetic.code_range(bits)
    return rng.integers(lowest, highest + 1, (rows, columns)).astype(np.int8)


def _scales(rng: np.random.Generator, count: int, powers_of_two: bool) -> np.ndarray:
    if powers_of_two:
        return np.exp2(rng.integers(-8, -3, count)).astype(np.float32)
    return arithmetic.round_to_bfloat16(rng.uniform(0.01, 0.1, count).astype(np.float32))


def _weight(codes_MK: np.ndarray, scale_M: np.ndarray, bits: int) -> FusedWeight:
    stored = torch.from_numpy(arithmetic.pack(codes_MK) if bits == 4 else codes_MK).cuda()
    return FusedWeight(stored, codes_MK.shape[1], bits, torch.from_numpy(scale_M).cuda())


def _magnitudes(x_NK: np.ndarray, codes_MK: np.ndarray) -> torch.Tensor:
    """What the parts of a sum may add up to: they are scaled before they meet."""
    return torch.from_numpy(x_NK).double().abs().cuda() @ torch.from_numpy(codes_MK).double().abs().cuda().T


def _milliseconds(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    for _ in range(5):
        run(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(REPEATS):
        run(x)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / REPEATS


if __name__ == "__main__":
    gpu()
