"""Quantized matrices in memory and as tensors: codes, bytes, and the values that they stand for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant.arithmetic import NonFiniteError
from quant.weights import QuantizedLinear, QuantizedWeight, stored_tensors

CODES = st.sampled_from([4, 8]).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        hnp.arrays(
            np.int8,
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
            elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        ),
    )
)


@given(CODES, st.booleans())
def test_codes_are_kept_and_stand_for_their_values(bits_and_codes, per_row):
    bits, codes_MK = bits_and_codes
    outputs, inputs = codes_MK.shape
    scale = np.float32(2.0) ** -np.arange(outputs if per_row else 1, dtype=np.float32)
    weight = QuantizedWeight.from_codes(codes_MK, bits, scale)
    assert weight.shape == codes_MK.shape
    assert weight.codes.dtype == np.int8
    np.testing.assert_array_equal(weight.codes, codes_MK)
    np.testing.assert_array_equal(weight.dequantized(), codes_MK.astype(np.float64) * scale[:, None])
    assert weight.dequantized().dtype == np.float32
    assert weight.nbytes == outputs * (-(-inputs // 2) if bits == 4 else inputs) + 4 * len(scale)


def test_dequantized_values_are_exact():
    """A code has at most 8 bits and a bfloat16 scale 8: their product has no more than float32's 24."""
    codes_MK = np.arange(-128, 128, dtype=np.int16).astype(np.int8)[None]
    scale = np.array([ml_dtypes.bfloat16(1.9921875 * 2.0**-100)], np.float32)
    values = QuantizedWeight.from_codes(codes_MK, 8, scale).dequantized()
    np.testing.assert_array_equal(values.astype(np.float64), codes_MK * scale.astype(np.float64))


def test_a_layer_counts_its_input_scale():
    weight = QuantizedWeight.from_codes(np.zeros((3, 5), np.int8), 4, np.ones(3, np.float32))
    assert QuantizedLinear(weight, 8).nbytes == weight.nbytes == 3 * 3 + 3 * 4
    assert QuantizedLinear(weight, 8, np.float32(0.5)).nbytes == weight.nbytes + 4


@pytest.mark.parametrize(("bits", "kind", "dtype", "width"), [(4, "packed", np.uint8, 3), (8, "codes", np.int8, 5)])
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_is_stored_as_codes_and_scales(bits, kind, dtype, width, static):
    codes_MK = np.arange(-7, 8, dtype=np.int8).reshape(3, 5).clip(-8, 7)
    weight = QuantizedWeight.from_codes(codes_MK, bits, np.array([0.5, 1, 2], np.float32))
    tensors = stored_tensors("a.q_proj", QuantizedLinear(weight, 8, np.float32(0.25) if static else None))
    names = {f"a.q_proj.weight_{kind}", "a.q_proj.weight_scale"} | ({"a.q_proj.input_scale"} if static else set())
    assert tensors.keys() == names
    stored = tensors[f"a.q_proj.weight_{kind}"]
    assert (stored.dtype, stored.shape) == (dtype, (3, width))
    np.testing.assert_array_equal(QuantizedWeight(stored, 5, bits, weight.scale).codes, codes_MK)
    np.testing.assert_array_equal(tensors["a.q_proj.weight_scale"], np.array([0.5, 1, 2], np.float32))
    if static:
        assert (tensors["a.q_proj.input_scale"].shape, tensors["a.q_proj.input_scale"].dtype) == ((1,), np.float32)
        assert tensors["a.q_proj.input_scale"] == 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_are_stored_as_bfloat16(dtype):
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
    (tensor,) = stored_tensors("lm_head", values).values()
    assert tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor, values.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_a_float_beyond_bfloat16_is_refused_by_name():
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: 1 of 3 .* \(2,\)"):
        stored_tensors("model.norm", np.array([1, 2, 3.4028235e38], np.float32))


def test_views_are_stored_as_they_look():
    codes_MK = np.arange(12, dtype=np.int8).reshape(3, 4)
    weight = QuantizedWeight.from_codes(codes_MK.T, 8, np.ones(1, np.float32))
    assert weight.stored.flags.c_contiguous
    np.testing.assert_array_equal(weight.codes, codes_MK.T)
    nibbles = QuantizedWeight.from_codes(codes_MK[:, ::-1].clip(-8, 7), 4, np.ones(1, np.float32))
    np.testing.assert_array_equal(nibbles.codes, codes_MK[:, ::-1].clip(-8, 7))
