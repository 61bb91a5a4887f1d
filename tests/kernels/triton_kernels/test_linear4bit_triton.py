"""Our 4-bit layer on the Triton kernels, against bitsandbytes' own layer."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from conftest import INTERPRETED
from four_bit_problems import dequantized_by_bitsandbytes

from ept.model.linear4bit import swap_linear4bit
from ept_kernels import FourBitWeight, launch
from ept_kernels.four_bit.weight import levels


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("columns, rows", [(64, 32), (40, 24)], ids=["fused", "blocks straddle rows"])
def test_layer_computes_as_bitsandbytes(columns, rows, nested, bias, device):
    torch.manual_seed(0)
    theirs = bitsandbytes.nn.Linear4bit(
        columns, rows, bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    theirs = theirs.to(device).train().requires_grad_(False)
    ours = copy.deepcopy(theirs)
    swap_linear4bit(ours)  # without `always`: the kernels are taken because they run here
    results = []
    x = torch.randn(5, columns, device=device)
    weight = dequantized_by_bitsandbytes(FourBitWeight.from_bitsandbytes(theirs), torch.float32)
    for layer in (ours, lambda t: torch.nn.functional.linear(t, weight, theirs.bias)):
        leaf = x.clone().requires_grad_()
        before = launch.launches()
        out = layer(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
        assert (launch.launches() > before) == (layer is ours)
    tolerance = 1e-5 if INTERPRETED else 2e-3  # a GPU may multiply float32 in its faster, rounded way
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("move", [False, True], ids=["", "moved after the swap"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_no_operator_makes_the_table_of_levels_after_the_swap(quant_type, move, device):
    """Made while a graph is captured, it would lie in the memory of the graph."""
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type=quant_type)
    layer = layer.to(device).train().requires_grad_(False)
    levels.cache_clear()
    swap_linear4bit(layer)
    if move:
        levels.cache_clear()
        layer.to(device)
    made = levels.cache_info()
    assert made.misses == 1
    x = torch.randn(5, 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert levels.cache_info().misses == made.misses
    assert levels.cache_info().hits >= made.hits + 2  # both operators have asked for it
