"""The Triton dequantisation of 4-bit weights against bitsandbytes, bit for bit.

Under the interpreter bfloat16 may be one unit off, since it truncates where a GPU rounds.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import INTERPRETED, launches_of, mostly_untouched
from four_bit_problems import (
    dequantized_by_bitsandbytes,
    levels_of_bitsandbytes,
    raise_programs,
    units_apart,
    watched_memory,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ept_kernels
from ept_kernels import FourBitWeight, launch
from ept_kernels.dev.problems import FourBit
from ept_kernels.four_bit import dequantize as kernels
from ept_kernels.launch import configured

__all__ = ["watched_memory"]

NF4, FP4 = "nf4", "fp4"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def problem_of(rows, columns, quant_type=NF4, block_size=64, nested=True, dtype=F16, shift=0) -> FourBit:
    kind = (quant_type, block_size, nested, dtype)
    return FourBit(rows, columns, (), *kind, shift=shift, operator="dequantize_4bit")


# Sizes and addresses; test_every_combination_equals_bitsandbytes has the kinds of weights.
PROBLEMS = [
    # whole words and whole tiles
    problem_of(32, 128, NF4, 64, True, F16),
    problem_of(64, 128, NF4, 4096, True, BF16),
    problem_of(8, 512, FP4, 512, False, F32),
    problem_of(40, 768, NF4, 64, True, BF16),  # more than one program
    # whole words: blocks straddle rows, the last one is short
    problem_of(13, 40, NF4, 32, False, F32),
    problem_of(5, 72, FP4, 128, True, F16),
    problem_of(300, 104, FP4, 32, True, BF16),  # more blocks than one nested absmax has
    problem_of(3, 1504, NF4, 4096, False, F16),
    problem_of(9, 648, FP4, 4096, True, F32),
    problem_of(77, 104, NF4, 512, True, F32),
    problem_of(11, 200, NF4, 128, True, F32),
    problem_of(11, 200, NF4, 128, False, BF16),
    problem_of(21, 24, FP4, 64, False, BF16),
    problem_of(10, 104, NF4, 512, False, BF16),
    # no whole words
    problem_of(1, 1, NF4, 64, False, F32),
    problem_of(1, 3, FP4, 4096, False, BF16),
    problem_of(33, 31, NF4, 32, True, F16),
    problem_of(5, 67, FP4, 64, True, F32),
    problem_of(5, 67, FP4, 128, False, F16),
    problem_of(67, 65, FP4, 512, True, F16),
    problem_of(3, 35, NF4, 32, False, F16),
    problem_of(61, 47, NF4, 128, True, torch.float64),
    # whole words at an odd address
    problem_of(8, 64, NF4, 64, True, F16, shift=1),
    problem_of(8, 64, FP4, 32, False, F32, shift=2),
]


def run(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    return kernels.dequantize_4bit(*weight.tensors, *weight.sizes, dtype)


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if INTERPRETED and actual.dtype == BF16:
        assert units_apart(actual, expected) <= 1
    else:
        assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {actual.numel()} differ"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_equals_bitsandbytes(problem, device):
    weight = problem.weight(device)
    expected = dequantized_by_bitsandbytes(weight, F32 if problem.dtype == torch.float64 else problem.dtype)
    assert_equal_bits(run(weight, problem.dtype), expected.to(problem.dtype))


@pytest.mark.parametrize("block_size", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("quant_type", [NF4, FP4])
def test_every_combination_equals_bitsandbytes(quant_type, block_size, device):
    """Exact in every type on a GPU; words and bytes, blocks that straddle rows, a short last block."""
    for nested, dtype, (rows, columns) in itertools.product((False, True), (F32, F16, BF16), ((13, 40), (5, 67))):
        test_equals_bitsandbytes(problem_of(rows, columns, quant_type, block_size, nested, dtype), device)


@pytest.mark.parametrize("quant_type", [NF4, FP4])
def test_levels_are_bitsandbytes_own(quant_type, device):
    """Every byte there is, at absmax 1: the levels' own bits, signs of zeros included."""
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    weight = FourBitWeight(packed, torch.ones(8, device=device), quant_type, 64, rows=8, columns=64)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).view(8, 64).long()
    expected = levels_of_bitsandbytes(quant_type, device)[nibbles]
    assert torch.equal(run(weight, F32).view(torch.int32), expected.view(torch.int32))


def test_product_and_sum_of_nested_absmax_are_rounded_separately(device):
    """Numbers for which a fused multiply-add gives other bits; test_aot.py looks at the option against that."""
    weight = problem_of(4, 64).weight(device)
    weight.nested_code.fill_(1 + 2**-12)
    weight.nested_absmax.fill_(1 + 2**-12)
    weight.nested_offset.fill_(-1.0)
    assert torch.tensor((1 + 2**-12) ** 2).item() != (1 + 2**-12) ** 2  # the product has to be rounded
    assert torch.equal(run(weight, F32), dequantized_by_bitsandbytes(weight, F32))


@pytest.mark.parametrize("rows, columns, expected", [(8, 64, 1), (5, 67, 1), (0, 64, 0), (8, 0, 0)])
def test_number_of_launches(rows, columns, expected, device):
    weight = problem_of(rows or 8, columns or 64).weight(device)
    arguments = (*weight.tensors, *weight.sizes[:3], rows, columns, F16)
    assert launches_of(kernels.dequantize_4bit, *arguments) == expected
    assert kernels.dequantize_4bit(*arguments).shape == (rows, columns)


def test_two_runs_give_equal_bits(device):
    weight = problem_of(40, 104).weight(device)
    assert torch.equal(run(weight, F16), run(weight, F16))


@pytest.mark.parametrize(
    "config", [{"UNITS": 32, "ITERS": 1}, {"UNITS": 512, "ITERS": 3, "num_warps": 8}, {"ITERS": 8}], ids=str
)
@pytest.mark.parametrize("problem", [PROBLEMS[3], PROBLEMS[9], PROBLEMS[16]], ids=lambda p: p.name)
def test_any_launch_configuration_is_right(config, problem, device):
    """A tuner may choose any of them."""
    with configured({f"dequantize_4bit/{8 * problem.dtype.itemsize}-bit": config}):
        test_equals_bitsandbytes(problem, device)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    quant_type=st.sampled_from([NF4, FP4]),
    block_size=st.sampled_from([2**i for i in range(5, 13)]),
    nested=st.booleans(),
    dtype=st.sampled_from([F32, F16]),
    shift=st.integers(0, 4),
)
def test_any_weight(device, rows, columns, quant_type, block_size, nested, dtype, shift):
    weight = problem_of(rows, columns, quant_type, block_size, nested, shift=shift).weight(device)
    assert_equal_bits(run(weight, dtype), ept_kernels.dequantize_4bit_reference(weight, dtype))


DAMAGES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    damaged=st.sampled_from((*DAMAGES, "quant_type", "block_size", "nested_block_size", "rows", "columns")),
    value=st.sampled_from([float("nan"), float("inf"), 3e38, -0.0, 0, 1, 2, 32, 64, 255, 333, 2**31, NF4, FP4, None]),
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
)
def test_any_damaged_weight_is_refused_or_read_within_its_tensors(device, damaged, value, rows, columns):
    """Contents may be anything; sizes that fit the tensors are another reading of them. Addresses are watched."""
    weight = problem_of(rows, columns, block_size=32).weight(device)
    parts = {name: getattr(weight, name) for name in weight.__dataclass_fields__}
    if damaged in DAMAGES and isinstance(value, (int, float)):
        high = 255 if parts[damaged].dtype == torch.uint8 else 1e38
        parts[damaged] = torch.full_like(parts[damaged], min(value, high) if math.isfinite(value) else high)
        if parts[damaged].is_floating_point() and not math.isfinite(value):
            parts[damaged].fill_(value)
    else:
        parts[damaged] = value
    try:
        weight, refusal = FourBitWeight(**parts), None
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "expected" in refusal
        return
    expected = ept_kernels.dequantize_4bit_reference(weight, F32)
    torch.testing.assert_close(run(weight, F32), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[14]], ids=lambda p: p.name)
def test_operator(problem, device):
    weight = problem.weight(device)
    torch.library.opcheck(torch.ops.ept.dequantize_4bit.default, (*weight.tensors, *weight.sizes, problem.dtype))
    assert_equal_bits(ept_kernels.dequantize_4bit(weight, problem.dtype), run(weight, problem.dtype))


@pytest.mark.parametrize("columns", [2**16, 2**16 + 1], ids=["words", "bytes"])
def test_offsets_have_64_bits(columns, device, monkeypatch):
    """The last tiles of a weight of more than 2³² elements. Under the interpreter only those are computed: the number
    of every program is raised.
    """
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("takes the memory of a GPU: `make gpu` runs it there, `make test` under the interpreter")
    rows, block_size, tail = 2**16 + 1, 4096, 5000  # elements that are not zero
    elements = rows * columns
    packed = torch.zeros(0 if INTERPRETED else (elements + 1) // 2, dtype=torch.uint8, device=device)
    if INTERPRETED:
        packed = mostly_untouched((elements + 1) // 2, torch.uint8)
        out = mostly_untouched(elements, F16).view(rows, columns)
        new_empty, launch_all = torch.Tensor.new_empty, launch.launch
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda x, *size, **kw: out if size == out.shape else new_empty(x, *size, **kw)
        )
        config = kernels.CONFIGS["dequantize_4bit"]
        programs = math.ceil(elements / (config["UNITS"] * (2 if elements % 8 else 8) * config["ITERS"]))
        few = -(-2 * tail // (config["UNITS"] * 2))
        raise_programs(monkeypatch, programs - few)
        monkeypatch.setattr(
            launch, "launch", lambda kernel, _, *args, **meta: launch_all(kernel, (few,), *args, **meta)
        )
    packed[-tail // 2 :] = torch.randint(0, 256, (tail // 2,), dtype=torch.uint8).to(device)
    absmax = torch.rand(math.ceil(elements / block_size), device=device)
    weight = FourBitWeight(packed, absmax, NF4, block_size, rows, columns)
    out = run(weight, F16).flatten()
    start = (elements - tail) // 2 * 2 + 2  # an even element within the random bytes
    nibbles = torch.stack([packed[start // 2 :] >> 4, packed[start // 2 :] & 15], 1).flatten()[: elements - start]
    scale = absmax[torch.arange(start, elements, device=device) // block_size]
    expected = (levels_of_bitsandbytes(NF4, device)[nibbles.long()] * scale).half()
    assert torch.equal(out[start:], expected)
