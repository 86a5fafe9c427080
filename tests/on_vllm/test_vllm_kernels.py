"""The products of the plugin's layers against `quant.arithmetic`: bit for bit, whatever kernel serves."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quant import arithmetic
from quant.hadamard import Hadamard

torch = pytest.importorskip("torch")

from runtime.engine import vllm_choice, vllm_native  # noqa: E402
from runtime.engine.native_library import NativeLibraryError, load_library  # noqa: E402
from runtime.engine.vllm_arithmetic import quantize_rows, token_scales  # noqa: E402
from runtime.engine.vllm_choice import choose_kernel  # noqa: E402
from runtime.engine.vllm_kernels import FloatKernel, FusedWeight, InputScheme, IntegerKernel  # noqa: E402
from runtime.engine.vllm_native import NativeKernel, load_operators  # noqa: E402

INPUT_SCALE = np.float32(0.25)
COLUMNS, OUTPUTS = 96, 24
SCALE_M = arithmetic.round_to_bfloat16(np.repeat(np.float32([0.03, 0.5, 0.0007]), 8))
"""Of three fused parts with a scale each."""


def native_is_built() -> bool:
    try:
        load_library()
    except NativeLibraryError:
        return False
    return True


needs_native = pytest.mark.skipif(not native_is_built(), reason="the native engine is not built")
CODED = [IntegerKernel, pytest.param(NativeKernel, marks=needs_native)]


def codes(rng: np.random.Generator, bits: int, rows: int = OUTPUTS, columns: int = COLUMNS) -> np.ndarray:
    lowest, highest = arithmetic.code_range(bits)
    return rng.integers(lowest, highest + 1, (rows, columns)).astype(np.int8)


def fused(codes_MK: np.ndarray, bits: int, scale_M: np.ndarray = SCALE_M) -> FusedWeight:
    stored = arithmetic.pack(codes_MK) if bits == 4 else codes_MK
    return FusedWeight(torch.from_numpy(stored), codes_MK.shape[1], bits, torch.from_numpy(scale_M))


def scheme(bits: int, static: bool, rotated: bool = False) -> InputScheme:
    return InputScheme(bits, torch.tensor([INPUT_SCALE]) if static else None, rotated)


def awkward_rows(rng: np.random.Generator, count: int = 40) -> np.ndarray:
    """Ties of rounding, saturation, a zero row, a NaN, an infinity."""
    x_NK = (rng.standard_normal((count, COLUMNS)) * 2).astype(np.float32)
    x_NK[:8] = np.round(x_NK[:8] * 8) / 8  # halves of the static scale
    x_NK[8], x_NK[9, 3], x_NK[10, 5] = 0, np.nan, np.inf
    return x_NK


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("input_bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_is_the_specification_bit_for_bit(kind: Any, static: bool, weight_bits: int, input_bits: int) -> None:
    rng = np.random.default_rng(7)
    x_NK, w_MK = awkward_rows(rng), codes(rng, weight_bits)
    kernel = kind(fused(w_MK, weight_bits), scheme(input_bits, static))
    with np.errstate(invalid="ignore"):
        expected_NM = arithmetic.quantized_linear(
            x_NK, INPUT_SCALE if static else None, w_MK, SCALE_M, input_bits, weight_bits
        )
    np.testing.assert_array_equal(kernel(torch.from_numpy(x_NK), torch.float32).numpy(), expected_NM)
    for dtype, oracle in ((torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)):
        rounded_NM = kernel(torch.from_numpy(x_NK), dtype).float().numpy()
        np.testing.assert_array_equal(rounded_NM, expected_NM.astype(oracle).astype(np.float32))


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_the_numbers_they_are(kind: Any, dtype: Any) -> None:
    rng = np.random.default_rng(8)
    w_MK, x = codes(rng, 4), torch.from_numpy(awkward_rows(rng)[:8]).to(dtype)
    y_NM = kind(fused(w_MK, 4), scheme(4, static=True))(x, torch.float32)
    expected_NM = arithmetic.quantized_linear(x.float().numpy(), INPUT_SCALE, w_MK, SCALE_M)
    np.testing.assert_array_equal(y_NM.numpy(), expected_NM)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("static", [True, False])
def test_rotated_inputs(kind: Any, static: bool) -> None:
    rng = np.random.default_rng(9)
    w_MK, x_NK = codes(rng, 4), rng.standard_normal((5, COLUMNS)).astype(np.float32)
    y_NM = kind(fused(w_MK, 4), scheme(4, static, rotated=True))(torch.from_numpy(x_NK), torch.float32)
    rotated_NK = Hadamard.of_width(COLUMNS).apply(x_NK)
    expected_NM = arithmetic.quantized_linear(rotated_NK, INPUT_SCALE if static else None, w_MK, SCALE_M)
    np.testing.assert_array_equal(y_NM.numpy(), expected_NM)


@pytest.mark.parametrize("kind", CODED)
def test_rows_that_were_quantized_elsewhere(kind: Any) -> None:
    rng = np.random.default_rng(10)
    w_MK, x_NK = codes(rng, 4), awkward_rows(rng)
    x = torch.from_numpy(x_NK)
    codes_NK, scales_N1 = quantize_rows(x, token_scales(x.abs().amax(dim=-1, keepdim=True), 4), 4)
    y_NM = kind(fused(w_MK, 4), scheme(4, static=False)).multiply(codes_NK, scales_N1, torch.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y_NM.numpy(), arithmetic.quantized_linear(x_NK, None, w_MK, SCALE_M))


@needs_native
@pytest.mark.parametrize("static", [True, False])
def test_a_compiler_takes_the_native_operator_as_it_is(static: bool) -> None:
    rng = np.random.default_rng(11)
    kernel = NativeKernel(fused(codes(rng, 4), 4), scheme(4, static))
    compiled = torch.compile(lambda x: kernel(x * 2, torch.bfloat16) + 1, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.from_numpy(awkward_rows(rng)[:rows])
        assert torch.equal(compiled(x), kernel(x * 2, torch.bfloat16) + 1)


@needs_native
def test_the_native_operators_refuse_what_does_not_fit() -> None:
    kernel = NativeKernel(fused(codes(np.random.default_rng(16), 4), 4), scheme(4, static=True))
    x, integers, scales = torch.zeros(3, COLUMNS), torch.zeros(3, COLUMNS, dtype=torch.int8), torch.ones(3)
    linear = partial(torch.ops.osp.native_linear, layer=kernel._handle, outputs=OUTPUTS, dtype=torch.float32)
    product = partial(torch.ops.osp.native_product, layer=kernel._handle, outputs=OUTPUTS, dtype=torch.float32)
    for call, message in (
        (lambda: linear(x[:, 1:].contiguous()), "other columns than the weights"),
        (lambda: linear(x[:, 1:]), "not a contiguous matrix"),
        (lambda: linear(x[0]), "not a contiguous matrix"),
        (lambda: linear(x.half()), "rows are float32 or bfloat16"),
        (lambda: linear(x, dtype=torch.float16), "rows are float32 or bfloat16"),
        (lambda: linear(x, layer=x), "the handle that PackedLinear gives"),
        (lambda: product(x, scales), "codes are int8"),
        (lambda: product(integers, scales[1:]), "not a float32 scale for each row"),
        (lambda: product(integers, scales.double()), "not a float32 scale for each row"),
        (lambda: product(integers, scales[:, None]), "not a contiguous vector"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@needs_native
def test_a_native_layer_lives_as_long_as_its_handle() -> None:
    kernel = NativeKernel(fused(codes(np.random.default_rng(17), 4), 4), scheme(4, static=True))
    x, handle = torch.randn(3, COLUMNS), kernel._handle.view(-1)
    expected = kernel(x, torch.float32)
    del kernel
    gc.collect()
    assert torch.equal(torch.ops.osp.native_linear(x, handle, OUTPUTS, torch.float32), expected)


@pytest.mark.parametrize("library", [None, "/no/libtorch_cpu.so"])  # None: what this process has for all
def test_a_torch_without_the_c_interface_computes_with_its_own(monkeypatch: Any, caplog: Any, library: Any) -> None:
    monkeypatch.setattr(vllm_native, "TORCH_CPU", library)
    monkeypatch.setattr(vllm_choice, "load_operators", load_operators.__wrapped__)
    vllm_choice._native_serves.cache_clear()
    try:
        kernel = choose_kernel(fused(codes(np.random.default_rng(18), 4), 4), scheme(4, static=True), torch.float32)
    finally:
        vllm_choice._native_serves.cache_clear()
    assert isinstance(kernel, IntegerKernel)
    assert "torch's own products serve" in caplog.text


@needs_native
def test_the_native_product_keeps_four_bits_a_weight() -> None:
    w_MK = codes(np.random.default_rng(12), 4, 640, 1024)
    kernel = NativeKernel(fused(w_MK, 4, np.ones(640, np.float32)), scheme(4, static=True))
    assert 640 * 1024 / 2 <= kernel.weight_bytes <= 1.01 * 640 * 1024 / 2
    assert kernel.name.startswith("native int4 (")


@pytest.mark.parametrize("kind", [FloatKernel, pytest.param(NativeKernel, marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone_in_4_bits(kind: Any, dtype: Any) -> None:
    rng = np.random.default_rng(13)
    w_MK = codes(rng, 4)
    x = torch.from_numpy(rng.standard_normal((9, COLUMNS)).astype(np.float32)).to(dtype)
    y_NM = kind(fused(w_MK, 4), InputScheme(16))(x, dtype).double().numpy()
    weight_MK = w_MK * SCALE_M[:, None].astype(np.float64)
    bound_NM = np.abs(x.double().numpy()) @ np.abs(weight_MK).T
    assert (np.abs(y_NM - x.double().numpy() @ weight_MK.T) <= 4 * torch.finfo(dtype).eps * bound_NM).all()


@needs_native
def test_floats_have_no_product_of_codes() -> None:
    kernel = NativeKernel(fused(codes(np.random.default_rng(14), 4), 4), InputScheme(16))
    with pytest.raises(ValueError, match="no codes"):
        kernel.multiply(torch.zeros(1, COLUMNS, dtype=torch.int8), torch.ones(1, 1), torch.float32)


def test_a_cpu_has_the_native_products_where_they_are_built() -> None:
    weight = fused(codes(np.random.default_rng(15), 4), 4)
    kernel = choose_kernel(weight, scheme(4, static=True), torch.bfloat16)
    assert isinstance(kernel, NativeKernel if native_is_built() else IntegerKernel)
