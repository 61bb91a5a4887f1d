"""`FourBitWeight` and the references over it, against bitsandbytes on the CPU."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from four_bit_helpers import dequantize, quantize
from torch import nn

from ept_kernels import (
    FourBitWeight,
    dequantize_4bit,
    dequantize_4bit_reference,
    matmul_4bit,
    matmul_4bit_backward,
    matmul_4bit_backward_reference,
    matmul_4bit_reference,
)
from ept_kernels.four_bit.weight import LEVELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 1024, 4096)
# One element, odd rows, blocks that straddle rows, a short last block, whole blocks.
SHAPES = ((1, 1), (5, 67), (33, 96), (64, 64), (3, 1000))
KINDS = list(product(LEVELS, (False, True)))
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place, of 1


@pytest.mark.parametrize("quant_type", LEVELS)
def test_levels_are_those_of_bitsandbytes(quant_type):
    assert torch.equal(torch.tensor(LEVELS[quant_type]), functional.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantises_to_the_bits_of_bitsandbytes(shape, block_size):
    for (quant_type, nested), dtype in product(KINDS, DTYPES):
        theirs = quantize(*shape, quant_type, nested, block_size)
        weight = FourBitWeight.from_bitsandbytes(theirs)
        expected = dequantize(theirs, dtype)
        for ours in (dequantize_4bit, dequantize_4bit_reference):
            assert torch.equal(ours(weight, dtype), expected), (quant_type, nested, dtype, ours)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant_type, nested", KINDS)
def test_nothing_is_copied(quant_type, nested, storage):
    """Every tensor is bitsandbytes' own memory, for any type, storage and layout of the packed weight."""
    for (rows, columns), block_size, transposed in product(((64, 128), (6, 72)), (32, 4096), (False, True)):
        theirs = quantize(rows, columns, quant_type, nested, block_size, storage=storage)
        state = theirs.quant_state
        data = theirs.data.t() if transposed else theirs.data
        source = Params4bit(data, quant_state=state, bnb_quantized=True)
        assert source.shape[0 if transposed else 1] == 1
        weight = FourBitWeight.from_bitsandbytes(source)
        parts = [state.absmax, *((state.state2.absmax, state.state2.code, state.offset) if nested else ())]
        kept = [t for t in weight.tensors if t is not None]
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (theirs, *parts)]
        assert [t.dtype for t in kept] == [torch.uint8, *(t.dtype for t in parts)]
        plain = FourBitWeight.from_bitsandbytes(quantize(rows, columns, quant_type, nested, block_size))
        assert torch.equal(weight.packed, plain.packed)


def test_reads_what_a_layer_may_hold():
    layer = Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    expected = dequantize(layer.weight, torch.float32)
    state = layer.weight.quant_state
    transposed = Params4bit(layer.weight.data.t(), quant_state=state, bnb_quantized=True)
    assert transposed.shape[0] == 1
    for source in (layer, layer.weight, transposed):
        assert torch.equal(dequantize_4bit(FourBitWeight.from_bitsandbytes(source), torch.float32), expected)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as sharding leaves it
    layer.quant_state = state
    assert torch.equal(dequantize_4bit(FourBitWeight.from_bitsandbytes(layer), torch.float32), expected)
    with pytest.raises(ValueError, match="no quant state"):
        FourBitWeight.from_bitsandbytes(layer.weight)
    with pytest.raises(ValueError, match="not quantised yet"):
        FourBitWeight.from_bitsandbytes(Linear4bit(64, 32))


def test_a_repacked_weight_is_refused():
    theirs = quantize(64, 128)
    theirs.quant_state.packing_format_for_cpu = True  # the mark that bitsandbytes leaves
    with pytest.raises(ValueError, match="repacked the weight for inference"):
        FourBitWeight.from_bitsandbytes(theirs)


def _set(path: str, value: Any) -> Any:
    def damage(state: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            state = getattr(state, parent)
        setattr(state, name, value(getattr(state, name)) if callable(value) else value)

    return damage


DAMAGES = {
    "quant_type is 'int4'": _set("quant_type", "int4"),
    "quant_type is None": _set("quant_type", None),
    "block_size is 48": _set("blocksize", 48),
    "block_size is 16": _set("blocksize", 16),
    "block_size is 8192": _set("blocksize", 8192),
    "block_size is None": _set("blocksize", None),
    "absmax.shape is (31,), expected (32,)": _set("absmax", lambda t: t[:-1]),
    "absmax.shape is (32, 1)": _set("absmax", lambda t: t[:, None]),
    "absmax.dtype is torch.bfloat16, expected torch.uint8": _set("absmax", lambda t: t.bfloat16()),
    "absmax is NoneType": _set("absmax", None),
    "absmax.stride() is (2,)": _set("absmax", lambda t: t.repeat_interleave(2)[::2]),
    "absmax.device is meta": _set("absmax", lambda t: t.to("meta")),
    "nested_absmax.shape is (2,), expected (1,)": _set("state2.absmax", lambda t: t.repeat(2)),
    "nested_code.shape is (255,)": _set("state2.code", lambda t: t[:-1]),
    "nested_code.dtype is torch.float64": _set("state2.code", lambda t: t.double()),
    "nested_block_size is 0": _set("state2.blocksize", 0),
    "nested_offset is NoneType": _set("offset", None),
    "nested_offset.shape is (2,)": _set("offset", lambda t: t.repeat(2)),
    "quant_state.nested is False, expected True": _set("nested", False),
    "quant_state.nested is True, expected False": _set("state2", None),
    "quant_state.shape is (2048,)": _set("shape", (2048,)),
    "quant_state.shape is None": _set("shape", None),
    "rows is 0": _set("shape", (0, 64)),
    "columns is 64.0": _set("shape", (32, 64.0)),
    "packed.shape is (1024,), expected (2048,)": _set("shape", (64, 64)),
    "code.shape is (15,)": _set("code", lambda t: t[:-1]),
    "code is [": _set("code", lambda t: t.flip(0)),
}


DAMAGED_DATA = {
    "the storage's dtype is torch.int64": lambda data: data.to(torch.int64),
    "not contiguous": lambda data: data.repeat(1, 2)[:, :1],
    "packed.shape is (1023,), expected (1024,)": lambda data: data[:-1],
    "packed.shape is (1025,), expected (1024,)": lambda data: torch.cat([data, data[:1]]),
}


@pytest.mark.parametrize("message", [*DAMAGES, *DAMAGED_DATA])
def test_a_damaged_weight_is_refused(message):
    theirs = quantize(32, 64)
    DAMAGES.get(message, lambda state: None)(theirs.quant_state)
    data = DAMAGED_DATA.get(message, lambda data: data)(theirs.data)
    with pytest.raises(ValueError) as error:
        FourBitWeight.from_bitsandbytes(Params4bit(data, quant_state=theirs.quant_state, bnb_quantized=True))
    assert message in str(error.value)
    assert "expected" in str(error.value)


def test_spare_bytes_of_the_last_storage_element_are_left_out():
    theirs = quantize(5, 67)  # 168 bytes
    padded = torch.cat([theirs.data, torch.zeros(2, 1, dtype=torch.uint8)])  # 170 bytes: 85 of bfloat16
    weight = Params4bit(padded.view(-1).view(torch.bfloat16)[:, None], quant_state=theirs.quant_state)
    with pytest.raises(ValueError, match=r"packed\.shape"):
        FourBitWeight.from_bitsandbytes(weight)  # a whole element too many
    theirs = quantize(5, 65)  # 163 bytes
    padded = torch.cat([theirs.data, torch.zeros(1, 1, dtype=torch.uint8)])
    weight = Params4bit(padded.view(-1).view(torch.bfloat16)[:, None], quant_state=theirs.quant_state)
    ours = dequantize_4bit(FourBitWeight.from_bitsandbytes(weight), torch.float32)
    assert torch.equal(ours, dequantize(theirs, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_against_float64(dtype):
    """Products of rounded weights and inputs, exact in float64, rounded once after a sum of K in float32."""
    torch.manual_seed(0)
    for (quant_type, nested), (rows, columns) in product(KINDS, ((5, 67), (64, 128))):
        weight = FourBitWeight.from_bitsandbytes(quantize(rows, columns, quant_type, nested))
        W = dequantize_4bit_reference(weight, dtype).double()
        bias = torch.randn(rows)
        for tokens in ((), (1,), (2, 3)):
            x, grad = torch.randn(*tokens, columns).to(dtype), torch.randn(*tokens, rows).to(dtype)
            for ours in (matmul_4bit, matmul_4bit_reference):
                _close(ours(x, weight, bias), x.double() @ W.T + bias, x.double().abs() @ W.abs().T + bias.abs())
                _close(ours(x, weight), x.double() @ W.T, x.double().abs() @ W.abs().T)
            for ours in (matmul_4bit_backward, matmul_4bit_backward_reference):
                _close(ours(grad, weight), grad.double() @ W, grad.double().abs() @ W.abs())


def _close(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """One rounding to the result's type, and those of a sum in float32 (random: √K of them, taken eightfold)."""
    in_sum = 8 * 128**0.5 * UNIT[torch.float32] * magnitude
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= UNIT[actual.dtype] * exact.abs() + in_sum).all()


def test_operands_that_do_not_fit_are_refused():
    weight = FourBitWeight.from_bitsandbytes(quantize(5, 67))
    x = torch.randn(2, 67)
    cases = [
        (lambda: matmul_4bit(x[:, :-1], weight), r"x has shape \(2, 66\)"),
        (lambda: matmul_4bit(torch.tensor(1.0), weight), r"x has shape \(\)"),
        (lambda: matmul_4bit(x.int(), weight), "x is torch.int32"),
        (lambda: matmul_4bit(x.to("meta"), weight), "x is on meta"),
        (lambda: matmul_4bit(x, weight, torch.zeros(4)), r"needs \(5,\)"),
        (lambda: matmul_4bit(x, weight, torch.zeros(5, dtype=torch.int64)), "bias is torch.int64"),
        (lambda: matmul_4bit_backward(x, weight), r"grad_output has shape \(2, 67\)"),
        (lambda: dequantize_4bit(weight, torch.int8), "cannot dequantise to torch.int8"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_weight_survives_copying():
    weight = FourBitWeight.from_bitsandbytes(quantize(5, 67))
    again = copy.deepcopy(weight)
    assert again.packed.data_ptr() != weight.packed.data_ptr()
    assert torch.equal(dequantize_4bit(again, torch.float32), dequantize_4bit(weight, torch.float32))
