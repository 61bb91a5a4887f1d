"""Calls of the operators of the token-dependent update."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..library import reference_of
from ..problem import TF32, Device, InTF32, Results, in_float64, largest, normal
from ..prompted_embedding.problems import PromptedEmbedding, random_ids


@dataclass(frozen=True)
class TokenUpdate(InTF32):
    """A padded batch; fields as in `PromptedEmbedding`; `parameters` is also the dtype of the bottleneck."""

    n: int = 63
    d: int = 64
    s: int = 5
    r: int = 3
    batch: int = 3
    padding: str = "right"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    vocabulary: int = 37
    scale: float = 1.7
    operator: str = field(default="prompted_embedding_by_token", kw_only=True)

    @property
    def small(self) -> TokenUpdate:
        return replace(self, n=min(self.n, 32), batch=min(self.batch, 2), vocabulary=min(self.vocabulary, 64))

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        embedding = PromptedEmbedding(self.n, m=max(self.n, 1), batch=self.batch, padding=self.padding)
        positions = embedding.positions().to(device, self.ids)
        ids = random_ids(g, self.batch * self.n, self.vocabulary).view(self.batch, self.n).to(self.ids)
        table = normal(g, self.vocabulary, self.d).to(self.dtype)
        shapes = (self.s, self.d), (self.d, self.r), (self.r,), (self.r, self.d), (self.d,)
        prompt, W_in, b_in, W_out, b_out = (normal(g, *shape).to(self.parameters) for shape in shapes)
        forward = (ids, positions, table, prompt, W_in, b_in, W_out, b_out)
        if not self.operator.endswith("_backward"):
            return *self.laid_out(*forward), self.scale
        hidden = reference_of("prompted_embedding_by_token")(*in_float64(forward), self.scale)[1].float()
        grad = normal(g, self.batch, self.s + self.n, self.d).to(self.dtype)
        return *self.laid_out(grad, ids, positions, table, W_out, hidden), self.scale

    def errors_allowed(self, actual: Results, expected: Results, inputs: tuple[Any, ...]) -> list[float]:
        """Allows the bottleneck's activations, kept in float32, the TF32 error of the output."""
        allowed = super().errors_allowed(actual, expected, inputs)
        if actual[0].dtype.itemsize == 2 and not self.operator.endswith("_backward"):
            magnitudes = (x.abs() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
            allowed[1] += TF32 * largest(self.expected(*magnitudes)[1])
        return allowed
