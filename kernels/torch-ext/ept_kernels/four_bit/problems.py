"""Calls of the operators of a 4-bit weight."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..problem import Device, Problem, normal
from .reference import dequantize_parts
from .weight import FourBitWeight

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class FourBit(Problem):
    """A 4-bit weight, and `tokens`, the leading dimensions of what it is multiplied with.

    The bytes are drawn, not quantised: every level occurs, and no quantiser is needed.

    Attributes:
        dtype: of tokens and results.
        bias: its type; None: there is none.
        strided: of the tokens.
        shift: bytes by which the packed weight is off a word-aligned address.
    """

    rows: int
    columns: int
    tokens: tuple[int, ...] = (5,)
    quant_type: str = "nf4"
    block_size: int = 64
    nested: bool = True
    dtype: torch.dtype = torch.float16
    bias: torch.dtype | None = None
    shift: int = 0
    operator: str = field(default="matmul_4bit", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        weight = self.weight(device, seed)
        if self.operator == "dequantize_4bit":
            return *weight.tensors, *weight.sizes, self.dtype
        if self.operator == "matmul_4bit_backward":
            return self.random(self.rows, device, seed), *weight.tensors, *weight.sizes
        bias = self.bias_tensor(device, seed)
        return self.random(self.columns, device, seed), *weight.tensors, bias, *weight.sizes

    def weight(self, device: Device = "cpu", seed: int = 0) -> FourBitWeight:
        g = torch.Generator(device).manual_seed(seed)
        elements = self.rows * self.columns
        blocks = -(-elements // self.block_size)

        def random_bytes(count: int) -> Tensor:
            return torch.randint(0, 256, (count,), generator=g, device=device, dtype=torch.uint8)

        packed = random_bytes(self.shift + -(-elements // 2))[self.shift :]
        nested: tuple[Any, ...] = ()
        if self.nested:
            absmax, groups = random_bytes(blocks), -(-blocks // NESTED_BLOCK_SIZE)
            code, offset = torch.linspace(-1, 1, 256, device=device), torch.ones((), device=device)
            nested = torch.rand(groups, generator=g, device=device) / 2, code, offset, NESTED_BLOCK_SIZE
        else:
            absmax = torch.rand(blocks, generator=g, device=device) + 0.5
        return FourBitWeight(packed, absmax, self.quant_type, self.block_size, self.rows, self.columns, *nested)

    def random(self, width: int, device: Device = "cpu", seed: int = 0) -> Tensor:
        """Draws the tokens (or their gradient) that the weight is multiplied with: `[*tokens, width]`."""
        x = normal(torch.Generator(device).manual_seed(seed + 1), *self.tokens, width)
        return self.laid_out(x.to(self.dtype))[0]

    def bias_tensor(self, device: Device = "cpu", seed: int = 0) -> Tensor | None:
        if self.bias is None:
            return None
        return normal(torch.Generator(device).manual_seed(seed + 2), self.rows).to(self.bias)

    def expected(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Dequantises the weight, rounds it to the tokens' type and multiplies in float64."""
        if self.operator == "dequantize_4bit":
            return (dequantize_parts(*inputs),)
        x, *weight = inputs
        bias = weight.pop(5) if self.operator == "matmul_4bit" else None
        W = dequantize_parts(*weight, x.dtype).double()
        out = x.double() @ (W.T if self.operator == "matmul_4bit" else W)
        return (out if bias is None else out + bias.double(),)

    def tolerance(self, dtype: torch.dtype) -> float:
        return 0.0 if self.operator == "dequantize_4bit" else super().tolerance(dtype)
