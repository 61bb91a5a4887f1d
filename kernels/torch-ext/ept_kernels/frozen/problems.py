"""Calls of the frozen model's element-wise operators, and those with which all of their kernels are compiled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..library import reference_of
from ..problem import Device, Problem, normal


@dataclass(frozen=True)
class RMSNorm(Problem):
    """Rows of a frozen norm.

    Attributes:
        weight: its dtype; None: that of the rows.
        residual: whether one is added, or in the backward whether it has a gradient.
    """

    rows: int = 5
    d: int = 64
    form: str = "llama"
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = None
    residual: bool = False
    operator: str = field(default="rms_norm", kw_only=True)

    @property
    def small(self) -> RMSNorm:
        return replace(self, rows=min(self.rows, 64))

    def tolerance(self, dtype: torch.dtype) -> float:
        """Allows three roundings: of the sum, of the normalised rows, and of their product with the weight."""
        return 3 * super().tolerance(dtype)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        x, other, residual = (normal(g, 1, self.rows, self.d).to(self.dtype) for _ in range(3))
        weight = (normal(g, self.d) / 8 + (0 if self.form == "gemma" else 1)).to(self.weight or self.dtype)
        x, other, weight, residual = self.laid_out(x, other, weight, residual)
        if self.operator == "rms_norm":
            return x, weight, residual if self.residual else None, 1e-6, self.form
        rstd = reference_of("rms_norm")(x, weight, None, 1e-6, self.form)[2]
        return (
            other.to(weight.dtype if self.form == "t5" else x.dtype),
            x,
            weight,
            rstd,
            (residual if self.residual else None),
            self.form,
        )


@dataclass(frozen=True)
class Rotary(Problem):
    """Queries and keys; `columns` of their `width` are rotated. shared: all texts have the same angles."""

    batch: int = 2
    q_heads: int = 4
    k_heads: int = 2
    n: int = 5
    width: int = 16
    columns: int = 16
    dtype: torch.dtype = torch.float32
    shared: bool = False
    interleaved: bool = False
    is_backward: bool = False
    operator: str = field(default="rotary", kw_only=True)

    @property
    def small(self) -> Rotary:
        return replace(self, n=min(self.n, 16))

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        q, k = (normal(g, self.batch, self.n, h, self.width).to(self.dtype) for h in (self.q_heads, self.k_heads))
        angles = normal(g, 1 if self.shared else self.batch, self.n, self.columns)
        q, k, cos, sin = self.laid_out(q, k, angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return q.transpose(1, 2), k.transpose(1, 2), cos, sin, self.interleaved, self.is_backward


@dataclass(frozen=True)
class Activation(Problem):
    """Elements of an activation: `gated_activation`, or `relu`, which has no gate."""

    shape: tuple[int, ...] = (3, 43)
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    operator: str = field(default="gated_activation", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        grad, gate, up = self.laid_out(*(2 * normal(g, *self.shape).to(self.dtype) for _ in range(3)))
        if self.operator.startswith("relu"):
            return (gate,) if self.operator == "relu" else (grad, reference_of("relu")(gate)[1])
        return (gate, up, self.activation) if self.operator == "gated_activation" else (grad, gate, up, self.activation)


def frozen_problems() -> list[Problem]:
    """Lists the frozen model's element-wise kernels in each form that compiles differently."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    norms = [
        RMSNorm(64, 4096, dtype=bf16, residual=True),
        RMSNorm(64, 768, "t5", bf16),
        RMSNorm(64, 768, "t5", f32, weight=bf16),
        RMSNorm(64, 3072, "gemma", bf16),
        RMSNorm(64, 128, dtype=f16),
        RMSNorm(64, 16384, dtype=f32, residual=True),
        RMSNorm(64, 2048, "olmo", bf16),
    ]
    rotaries = [Rotary(2, 32, 32, 16, 128, 128, bf16), Rotary(2, 32, 8, 16, 128, 128, f32, shared=True)]
    rotaries += [Rotary(2, 16, 16, 16, 256, 64, f16, interleaved=interleaved) for interleaved in (False, True)]
    gated = [
        Activation((64, 4096), name, dtype) for name in ("silu", "gelu", "gelu_tanh", "relu") for dtype in (bf16, f32)
    ]
    relus = [Activation((64, 4096), dtype=dtype, operator="relu") for dtype in (bf16, f32)]
    return [
        *(x for problem in [*norms, *gated, *relus] for x in (problem, problem.backward)),
        *(replace(problem, is_backward=is_backward) for problem in rotaries for is_backward in (False, True)),
    ]
