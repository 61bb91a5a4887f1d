"""The Triton products with 4-bit weights against float64, with the weight exactly as it is dequantised.

bitsandbytes' own tests of its products allow a mean error of 0.115 (test_matmul_4bit, it measures the quantisation)
and mean differences between its fused and its dequantised product (test_gemv_4bit, `THEIR_MEAN` below). Here every
single result is held to the rounding of its type, plus float32's over a sum of that length; and the mean error beyond
the rounding of the result to a tenth of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED, far_apart, launches_of, mostly_untouched, rounding
from four_bit_problems import covers, levels_of_bitsandbytes, raise_programs, watched_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ept_kernels
from ept_kernels import FourBitWeight, launch
from ept_kernels.dev.problems import FourBit
from ept_kernels.four_bit import matmul as kernels
from ept_kernels.four_bit import paths as four_bit_paths
from ept_kernels.four_bit.decode import levels_of_tile
from ept_kernels.four_bit.weight import Weight, levels
from ept_kernels.launch import configured

__all__ = ["watched_memory"]

NF4, FP4 = "nf4", "fp4"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FUSED, LIBRARY = "fused", "library"

PROBLEMS = [
    # fused: one tile, several tiles and splits, parts of tiles, blocks larger and smaller than a tile
    FourBit(64, 128, (1,), NF4, 64, True, F32, bias=F32),
    FourBit(130, 1536, (16,), NF4, 64, True, F16, bias=F16),
    FourBit(33, 1024, (7,), FP4, 512, False, BF16, bias=F32),
    FourBit(70, 96, (3, 2), NF4, 32, False, F16),
    FourBit(300, 320, (17,), FP4, 64, True, F32),
    FourBit(513, 384, (32,), NF4, 128, False, BF16),
    FourBit(24, 4096, (2,), NF4, 4096, False, F32),
    FourBit(24, 4096, (2,), FP4, 4096, True, F16, bias=BF16),
    FourBit(200, 1152, (5,), FP4, 128, True, F16),
    FourBit(40, 2048, (1, 1, 9), NF4, 512, True, BF16, bias=BF16),
    FourBit(129, 288, (31,), FP4, 32, True, BF16),
    FourBit(100, 192, (2, 3), NF4, 64, True, F32, bias=F16, strided=True),
    FourBit(100, 192, (6,), FP4, 64, False, F16, strided=True),
    FourBit(128, 128, (), NF4, 64, True, F32, bias=F32),
    FourBit(70, 1152, (50,), FP4, 128, True, F16),
    FourBit(33, 256, (64,), NF4, 64, True, BF16, bias=BF16),
    # dequantised first: many tokens, straddling blocks, odd sizes, an odd address
    FourBit(64, 128, (65,), NF4, 64, True, F32, bias=F32),
    FourBit(64, 128, (5, 13), FP4, 64, False, F16, bias=F32),
    FourBit(40, 96, (3,), NF4, 64, True, F32),
    FourBit(5, 67, (4,), FP4, 32, True, BF16, bias=BF16),
    FourBit(5, 67, (4,), NF4, 128, False, F16, strided=True),
    FourBit(64, 128, (4,), NF4, 64, True, F16, shift=1),
    # nothing to do, or a sum of nothing
    FourBit(64, 128, (0,), bias=F16),
    FourBit(64, 128, (3, 0), dtype=BF16),
]


def path(problem: FourBit) -> str:
    """The one to be taken. On a GPU float32 tokens are left to the library."""
    fused = 0 < math.prod(problem.tokens) <= 64 and problem.columns % problem.block_size == 0 and not problem.shift
    return FUSED if fused and (INTERPRETED or problem.dtype != F32) else LIBRARY


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes the heuristics' paths and configurations, whatever was measured here, and not bitsandbytes: on a GPU
    it has the fewest tokens, and what it makes of them is not tested here.
    """
    monkeypatch.setattr(launch, "_measured", lambda path: {})
    monkeypatch.setattr(four_bit_paths, "has_bitsandbytes", lambda: False)
    launch._forget_choices()
    yield
    launch._forget_choices()


def forward(x: Tensor, weight: FourBitWeight, bias: Tensor | None) -> Tensor:
    return four_bit_paths.matmul_4bit(x, *weight.tensors, bias, *weight.sizes)


def backward(grad_output: Tensor, weight: FourBitWeight) -> Tensor:
    return four_bit_paths.matmul_4bit_backward(grad_output, *weight.tensors, *weight.sizes)


def exact_weight(weight: FourBitWeight, path: str, dtype: torch.dtype) -> Tensor:
    """As the products of that path see it, in float64: rounded to the tokens' type, but fused under the interpreter."""
    device = weight.packed.device
    if path == FUSED:
        dtype = kernels.operand_type(dtype, device)
        return ept_kernels.dequantize_4bit_reference(weight, dtype).double()
    return ept_kernels.dequantize_4bit(weight, dtype).double()  # under the interpreter bfloat16 is truncated


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, summed: int, what: str) -> None:
    """`magnitude`: of what was added up, `summed` products each."""
    assert actual.shape == exact.shape, what
    tolerance = torch.finfo(F32).eps * math.sqrt(max(summed, 1)) * magnitude + rounding(actual, exact)
    error = (actual.double() - exact).abs() - tolerance
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert (error <= 0).all(), f"{what}: {int((error > 0).sum())} of {error.numel()} off, the worst by {error.max()}"


def check_forward(problem: FourBit, device: torch.device) -> None:
    x, *_ = problem.inputs(device)
    weight, bias = problem.weight(device), problem.bias_tensor(device)
    actual = forward(x, weight, bias)
    W = exact_weight(weight, path(problem), problem.dtype)
    b = torch.zeros(problem.rows, dtype=torch.float64, device=device) if bias is None else bias.double()
    if path(problem) == LIBRARY and bias is not None:
        b = bias.to(problem.dtype).double()  # the library takes it in the tokens' type
    exact, magnitude = x.double() @ W.T + b, x.double().abs() @ W.abs().T + b.abs()
    assert actual.dtype == problem.dtype
    assert_close(actual, exact, magnitude, problem.columns, "product")


def check_backward(problem: FourBit, device: torch.device) -> None:
    weight, grad = problem.weight(device), problem.random(problem.rows, device)
    actual = backward(grad, weight)
    W = exact_weight(weight, LIBRARY, problem.dtype)
    assert actual.dtype == problem.dtype
    assert_close(actual, grad.double() @ W, grad.double().abs() @ W.abs(), problem.rows, "gradient")


@triton.jit
def store_levels(levels, words, out):
    o_word = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_level = tl.reshape(levels_of_tile(levels, tl.load(words + o_word)), [4, 16, 8])
    tl.store(out + o_word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :], b_level)


@pytest.mark.parametrize("quant_type", [NF4, FP4])
def test_levels_of_a_tile_are_bitsandbytes_own(quant_type, device):
    """Every byte there is, in order: the levels' own bits, signs of zeros included."""
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.full((512,), float("nan"), device=device)
    launch.launch(store_levels, (1,), levels(quant_type, device), packed.view(torch.int32), out)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    expected = levels_of_bitsandbytes(quant_type, device)[nibbles]
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_product_and_input_gradient(problem, device):
    check_forward(problem, device)
    check_backward(problem, device)


# What test_gemv_4bit allows as a mean over √K, in weights of variance 1/K: by type, for K up to 512 and beyond.
THEIR_MEAN = {F32: (5e-8, 5e-8), F16: (7e-5, 6e-5), BF16: (6e-4, 1.4e-4)}


@pytest.mark.parametrize("K", [128, 1024])
@pytest.mark.parametrize("dtype", THEIR_MEAN, ids=str)
def test_errors_are_a_tenth_of_what_bitsandbytes_allows(dtype, K, device):
    """Their problem: one token of K normal numbers. No implementation can do without the rounding of its result."""
    problem = FourBit(64, K, (1,), dtype=dtype)
    allowed = THEIR_MEAN[dtype][K > 512] * math.sqrt(K) / 10
    weight = problem.weight(device)
    scale = float(ept_kernels.dequantize_4bit_reference(weight, F32).std()) * math.sqrt(K)
    for part in (weight.nested_absmax, weight.nested_offset):
        part.div_(scale)
    W, W_library = exact_weight(weight, path(problem), dtype), exact_weight(weight, LIBRARY, dtype)
    assert W.std().item() == pytest.approx(K**-0.5, rel=0.01)
    x, grad = problem.random(K, device), problem.random(64, device)
    for actual, exact in (
        (forward(x, weight, None), x.double() @ W.T),
        (backward(grad, weight), grad.double() @ W_library),
    ):
        truncated = INTERPRETED and dtype == BF16
        rounding = torch.finfo(dtype).eps * (1 if truncated else 0.5) * exact.abs()
        beyond = ((actual.double() - exact).abs() - rounding).clamp(min=0)
        assert beyond.mean().item() <= allowed, (beyond.mean().item(), allowed)


def test_problems_cover_what_is_promised():
    fused = [p for p in PROBLEMS if path(p) == FUSED]
    assert {p.block_size for p in fused} == {32, 64, 128, 512, 4096}
    assert not covers(fused, quant_type={NF4, FP4}, nested={True, False}, dtype={F32, F16, BF16})
    assert {p.bias for p in PROBLEMS} >= {None, F32, F16, BF16}


@pytest.mark.parametrize(
    "problem, launches",
    [
        (FourBit(64, 128, (5,), bias=F16), 1),
        (FourBit(70, 1024, (5,)), 2),  # the sum is split
        (FourBit(64, 128, (65,)), 1),
        (FourBit(5, 67), 1),
        (FourBit(64, 128, (0,)), 1),
    ],
    ids=str,
)
def test_number_of_launches(problem, launches, device):
    weight, x = problem.weight(device), problem.random(problem.columns, device)
    grad, bias = problem.random(problem.rows, device), problem.bias_tensor(device)
    assert (launches_of(forward, x, weight, bias), launches_of(backward, grad, weight)) == (launches, 1)
    weight = Weight(*weight.tensors, *weight.sizes)
    taken = four_bit_paths.path_of(weight, math.prod(problem.tokens), F16)
    assert taken == (four_bit_paths.FUSED if path(problem) == FUSED else four_bit_paths.LIBRARY)


@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[4], PROBLEMS[16]], ids=lambda p: p.name)
def test_two_runs_give_equal_bits(problem, device):
    weight = problem.weight(device)
    x, grad = problem.random(problem.columns, device), problem.random(problem.rows, device)
    assert torch.equal(forward(x, weight, None), forward(x, weight, None))
    assert torch.equal(backward(grad, weight), backward(grad, weight))


CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "SPLITS": 3},
    {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 256, "SPLITS": 1},
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 512, "SPLITS": 100},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("problem", [FourBit(70, 576, (5, 5)), FourBit(130, 320, (20,), block_size=32)], ids=str)
def test_any_launch_configuration_is_right(config, problem, device):
    """A tuner may choose any of them; more splits than tiles become as many as there are tiles."""
    with configured({"matmul_4bit/32/16-bit": config}):
        check_forward(problem, device)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 100),
    columns=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 256, 320, 512])),
    tokens=st.integers(1, 20),
    quant_type=st.sampled_from([NF4, FP4]),
    block_size=st.sampled_from([32, 64, 128, 256, 512]),
    nested=st.booleans(),
)
def test_any_sizes(device, rows, columns, tokens, quant_type, block_size, nested):
    problem = FourBit(rows, columns, (tokens,), quant_type, block_size, nested, F16, bias=F16)
    check_forward(problem, device)
    check_backward(problem, device)


def test_nan_of_one_token_stays_with_it(device):
    problem = FourBit(70, 192, (5,))
    weight, x, grad = problem.weight(device), problem.random(192, device), problem.random(70, device)
    for run, tokens in ((lambda t: forward(t, weight, None), x), (lambda t: backward(t, weight), grad)):
        clean = run(tokens)
        tokens[2, 3] = float("nan")
        spoilt = run(tokens)
        assert spoilt[2].isnan().all()
        assert torch.equal(spoilt[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("problem", [FourBit(64, 128, (2, 3)), FourBit(5, 67)], ids=path)
def test_autocast_changes_nothing(problem, device):
    """The operators' type is the tokens' own."""
    weight, bias = problem.weight(device), torch.randn(problem.rows, device=device)
    x, grad = (problem.random(width, device).float() for width in (problem.columns, problem.rows))
    plain = forward(x, weight, bias), backward(grad, weight)
    with torch.autocast(device.type, dtype=BF16):
        cast = ept_kernels.matmul_4bit(x, weight, bias), ept_kernels.matmul_4bit_backward(grad, weight)
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == F32
        assert torch.equal(a, b)


@pytest.mark.parametrize("problem", [FourBit(64, 128, (2, 3), bias=F32), FourBit(5, 67)], ids=str)
def test_operators(problem, device):
    weight, bias = problem.weight(device), problem.bias_tensor(device)
    x, grad = problem.random(problem.columns, device), problem.random(problem.rows, device)
    operators: Any = torch.ops.ept
    torch.library.opcheck(operators.matmul_4bit.default, (x, *weight.tensors, bias, *weight.sizes))
    torch.library.opcheck(operators.matmul_4bit_backward.default, (grad, *weight.tensors, *weight.sizes))
    assert torch.equal(ept_kernels.matmul_4bit(x, weight, bias), forward(x, weight, bias))
    assert torch.equal(ept_kernels.matmul_4bit_backward(grad, weight), backward(grad, weight))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can run one program of a grid")
@pytest.mark.parametrize("splits, elements", [(3, 2**30), (1, 2**31 + 1024)])
def test_offsets_of_partial_sums_have_64_bits(splits, elements, device, monkeypatch):
    """The last tile of results whose partial sums, or which themselves, go beyond 2³¹."""
    config = kernels.CONFIGS["matmul_4bit_reduce"]
    partial = mostly_untouched(splits * elements, F32).view(splits, elements)
    out = mostly_untouched(elements, F32)
    partial[:, -5:] = torch.randn(splits, 5)
    raise_programs(monkeypatch, elements // config["BLOCK_E"] - 1)
    kernel = kernels.matmul_4bit_reduce_kernel
    launch.launch(kernel, (1,), partial, None, out, splits, elements, 4096, **config)
    torch.testing.assert_close(out[-5:], partial[:, -5:].sum(0))
    assert out[-5:].abs().min() > 0


@pytest.mark.parametrize("dim", [-1, -2])
def test_offsets_of_tokens_have_64_bits(dim, device):
    if device.type != "cpu":
        pytest.skip("a GPU has no memory that is reserved but untouched; offsets are the same under the interpreter")
    problem = FourBit(24, 128, (5,))
    weight, x = problem.weight(), problem.random(128)
    assert torch.equal(forward(far_apart(x, dim), weight, None), forward(x, weight, None))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can run one program of a grid")
def test_offsets_have_64_bits(device, monkeypatch):
    """The last tiles of a weight of more than 2³³ bytes, so of more words than 32 bits count, in memory that is mostly
    untouched: numbers of programs are raised to theirs.
    """
    rows, columns, block = 2**13 + 3, 2**21, 4096
    tail = FourBit(3, columns, block_size=block, nested=False).weight()
    packed = mostly_untouched(rows * columns // 2, torch.uint8)
    packed[-tail.packed.numel() :] = tail.packed
    absmax = mostly_untouched(rows * columns // block, F32)
    absmax[-tail.absmax.numel() :] = tail.absmax
    weight = FourBitWeight(packed, absmax, NF4, block, rows, columns)
    W = ept_kernels.dequantize_4bit_reference(tail, F32)

    raise_programs(monkeypatch, rows // 16, columns // 4096 - 1, 0)
    x = torch.randn(2, columns)
    out = mostly_untouched(columns // 4096 * 2 * rows, F32).view(-1, 2, rows)
    pointers = Weight(*weight.tensors, *weight.sizes).pointers()
    options = {"BLOCK_SIZE": block, "NESTED_BLOCK_SIZE": 0, "OPERAND": kernels.tl.float32}
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 4096}
    arguments = (*pointers, x, None, out, 2, rows, columns, 1, *x.stride())
    launch.launch(kernels.matmul_4bit_kernel, (1, 1, 1), *arguments, **options, **tile)
    exact = x[:, -4096:].double() @ W[:, -4096:].double().T
    assert (out[-1][:, -3:].double() - exact).abs().max() < 1e-4
