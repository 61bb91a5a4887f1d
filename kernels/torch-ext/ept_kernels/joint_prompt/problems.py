"""Calls of the joint prompt and its backward."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..problem import Device, Problem, low_rank_prompt, normal


@dataclass(frozen=True)
class JointPrompt(Problem):
    """Sizes of a joint prompt: `K` spaces of width `h`, maps of width `a`.

    Scores, gates and activations are of order one. `scale` is that of the entries of prompt, A and B.
    """

    s: int = 5
    d: int = 64
    m: int = 7
    r: int = 3
    K: int = 4
    h: int = 2
    a: int = 0
    fusion: bool = True
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    operator: str = field(default="joint_prompt", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        arguments = (*self.parameters(device, seed), *self.options())
        return (self.grad_output(device, seed), *arguments) if self.operator.endswith("backward") else arguments

    def parameters(self, device: Device = "cpu", seed: int = 0) -> list[Tensor]:
        """Draws prompt, A, B, beta, W_q, W_k, D, U, G."""
        g = torch.Generator(device).manual_seed(seed)
        columns, gates, small = self.K * self.h, self.K if self.K > 1 else 0, self.d**-0.5
        tensors = [self.scale * x for x in low_rank_prompt(g, self.s, self.m, self.r, self.d)]
        tensors += [normal(g, int(self.fusion)), small * normal(g, self.d, self.a), small * normal(g, self.d, self.a)]
        tensors += [small * normal(g, self.d, columns), normal(g, columns, self.d), small * normal(g, self.d, gates)]
        return [*self.laid_out(*(x.to(self.dtype) for x in tensors))]

    def options(self) -> tuple[float, float, float, str]:
        """Returns lowrank_scale, embedding_scale, score_scale, activation; the softmax is not saturated."""
        return 1.3, 0.7, 2.0 / self.a**0.5 if self.a else 8.0 / self.d, self.activation

    def grad_output(self, device: Device = "cpu", seed: int = 0) -> Tensor:
        grad = normal(torch.Generator(device).manual_seed(seed + 1), self.s, self.d)
        return self.laid_out(grad.to(self.dtype))[0]

    def tolerance(self, dtype: torch.dtype) -> float:
        """Allows ten times as much in float32: summands of gradients cancel, and a wrong kernel is off by far more."""
        return max(super().tolerance(dtype), 1e-4)
