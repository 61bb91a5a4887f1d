"""Random shapes, block sizes and damages of 4-bit weights: the right answer, or a clear error."""

from __future__ import annotations

import math

import pytest
import torch
from four_bit_helpers import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from ept_kernels import FourBitWeight, dequantize_4bit, matmul_4bit, matmul_4bit_backward

SIZES = st.integers(1, 200)
BLOCK_SIZES = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.sampled_from(["nf4", "fp4"]), st.booleans(), BLOCK_SIZES, DTYPES, st.integers(0, 9))
def test_any_whole_weight_is_right(rows, columns, quant_type, nested, block_size, dtype, tokens):
    theirs = quantize(rows, columns, quant_type, nested, block_size, seed=rows)
    weight = FourBitWeight.from_bitsandbytes(theirs)
    W = dequantize(theirs, dtype)
    assert torch.equal(dequantize_4bit(weight, dtype), W)
    x, grad = torch.randn(tokens, columns), torch.randn(tokens, rows)
    if dtype == torch.float32:
        torch.testing.assert_close(matmul_4bit(x, weight), x @ W.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(matmul_4bit_backward(grad, weight), grad @ W, rtol=1e-5, atol=1e-4)


# What a damaged file or a wrong conversion may put in place of a field.
LENGTHS = st.sampled_from([-1, 1, 7])
OTHER_DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool])
FIELDS = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
SCALARS = st.one_of(
    st.none(),
    st.integers(-5, 5000),
    st.sampled_from([32, 64, 256, "nf4", "fp4"]),
    st.floats(),
    st.text(max_size=4),
    st.booleans(),
)


def _parts(weight: FourBitWeight) -> dict:
    return {name: getattr(weight, name) for name in weight.__dataclass_fields__}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FIELDS), st.sampled_from(["length", "dtype", "none", "axis"]), LENGTHS, OTHER_DTYPES)
def test_any_damaged_tensor_is_refused(name, kind, length, dtype):
    parts = _parts(FourBitWeight.from_bitsandbytes(quantize(40, 500)))
    tensor = parts[name].reshape(-1)
    parts[name] = {
        "length": lambda: tensor[:-1] if length < 0 else torch.cat([tensor, tensor[:1].expand(length)]),
        "dtype": lambda: tensor.to(dtype),
        "none": lambda: None,
        "axis": lambda: tensor[None],
    }[kind]()
    with pytest.raises(ValueError, match=f"4-bit weight: {name}.* is .*, expected "):
        FourBitWeight(**parts)


def _fits(parts: dict) -> bool:
    """Checks whether the lengths fit the sizes, counted independently."""
    if parts["quant_type"] not in ("nf4", "fp4") or parts["block_size"] not in [2**i for i in range(5, 13)]:
        return False
    if any(not isinstance(parts[name], int) or parts[name] < 1 for name in ("rows", "columns", "nested_block_size")):
        return False
    elements = parts["rows"] * parts["columns"]
    blocks = math.ceil(elements / parts["block_size"])
    wanted = (math.ceil(elements / 2), blocks, math.ceil(blocks / parts["nested_block_size"]))
    return wanted == tuple(parts[name].shape[0] for name in ("packed", "absmax", "nested_absmax"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["quant_type", "block_size", "nested_block_size", "rows", "columns"]), SCALARS)
def test_any_other_scalar_is_refused_or_consistent(name, value):
    """Sizes that fit all lengths are another reading of the same bytes, in bounds; all others are refused."""
    parts = _parts(FourBitWeight.from_bitsandbytes(quantize(40, 500)))
    parts[name] = value
    fits = isinstance(value, (str, int)) and not isinstance(value, bool) and _fits(parts)
    if not fits:
        with pytest.raises(ValueError, match="expected"):
            FourBitWeight(**parts)
        return
    weight = FourBitWeight(**parts)
    assert dequantize_4bit(weight, torch.float32).shape == (weight.rows, weight.columns)
