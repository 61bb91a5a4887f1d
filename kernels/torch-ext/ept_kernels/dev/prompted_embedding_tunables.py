"""What the tuner measures of the prompted embedding: every kernel at the shapes of a T5-base and of a Llama-2-7B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..launch import AotCase, Config, Tunable, grid, in_float64, padded
from ..prompted_embedding import launchers as launchers
from ..prompted_embedding.configs import aot_case, bounded, heuristic, key, pointer_types
from ..prompted_embedding.reference import (
    prompted_embedding_backward_reference,
    prompted_embedding_packed_reference,
    prompted_embedding_reference,
)

_FORWARD_GRID = grid(BLOCK_T=(16, 32, 64), BLOCK_D=(64, 128, 256), ITERS=(1, 4, 16), num_warps=(4, 8))
_BACKWARD = (launchers.prompted_embedding_backward, prompted_embedding_backward_reference, "backward")

# kernel: (launcher, reference, which inputs, candidates)
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, list[Config]]] = {
    "prompted_embedding": (
        launchers.prompted_embedding,
        prompted_embedding_reference,
        "forward",
        _FORWARD_GRID,
    ),
    "prompted_embedding_packed": (
        launchers.prompted_embedding_packed,
        prompted_embedding_packed_reference,
        "packed",
        _FORWARD_GRID,
    ),
    "prompted_embedding_token_at": (*_BACKWARD, grid(BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128, 256))),
    "prompted_embedding_backward": (
        *_BACKWARD,
        grid(BLOCK_M=(32, 64, 128), BLOCK_D=(32, 64, 128), STAGES=(2, 4, 6), num_warps=(4, 8)),
    ),
    "prompted_embedding_reduce": (*_BACKWARD, grid(BLOCK_E=(64, 256, 1024), BLOCK_P=(4, 16))),
}
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Problem:
    """One training batch without padding."""

    d: int
    r: int
    vocabulary: int
    batch: int
    n: int
    s: int = 40
    dtype: torch.dtype = torch.bfloat16

    def forward(self, device: torch.device, seed: int) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        ids = torch.randint(0, self.vocabulary, (self.batch, self.n), generator=g, device=device)
        table = torch.randn(self.vocabulary, self.d, generator=g, device=device).to(self.dtype)
        return ids, self._positions(device), table, *self._parameters(device, g), 0.5

    def packed(self, device: torch.device, seed: int) -> tuple[Any, ...]:
        ids, _, *rest = self.forward(device, seed)
        cu_seqlens = torch.arange(self.batch + 1, dtype=torch.int32, device=device) * self.n
        return ids.flatten(), cu_seqlens, *rest

    def backward(self, device: torch.device, seed: int) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        grad = torch.randn(self.batch, self.s + self.n, self.d, generator=g, device=device).to(self.dtype)
        _, A, B = self._parameters(device, g)
        return grad, self._positions(device), A, B, 0.5

    def _positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.n, device=device).repeat(self.batch, 1)

    def _parameters(self, device: torch.device, g: torch.Generator) -> list[Tensor]:
        shapes = ((self.s, self.d), (self.n, self.r), (self.r, self.d))
        return [torch.randn(shape, generator=g, device=device) for shape in shapes]


T5_BASE = Problem(d=768, r=30, vocabulary=32128, batch=32, n=256)
PROBLEMS = (
    T5_BASE,
    replace(T5_BASE, dtype=torch.float32),
    Problem(d=4096, r=60, vocabulary=32000, batch=32, n=512),
)
REDUCED = (Problem(d=40, r=3, vocabulary=11, batch=2, n=5, s=2),)


def tunables(reduced: bool = False) -> list[Tunable]:
    """Five kernels a problem; `reduced`: one tiny problem and two candidates each."""
    problems = REDUCED if reduced else PROBLEMS
    return [_tunable(kernel, problem, most=2 if reduced else None) for problem in problems for kernel in KERNELS]


def _tunable(kernel: str, problem: Problem, most: int | None) -> Tunable:
    launcher, reference, inputs, candidates = KERNELS[kernel]
    d, r, dtype = problem.d, problem.r, problem.dtype
    default = heuristic(kernel, d, r, dtype)
    complete = [{**default, **candidate} for candidate in candidates]

    def aot(config: Config) -> AotCase:
        types = pointer_types(TRITON_TYPES[dtype], mixed=False)
        return aot_case(kernel, f"{TRITON_TYPES[dtype]} d={d} r={r}", types, d, r, config)

    return Tunable(
        kernel=key(kernel, dtype),
        size=(d, padded(r)),
        default=default,
        candidates=[config for config in complete if bounded(config, d, r) == config][:most],
        operator=launcher,
        inputs=getattr(problem, inputs),
        reference=in_float64(reference),
        aot=aot,
    )
