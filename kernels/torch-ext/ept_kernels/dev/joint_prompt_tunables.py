"""What the tuner measures of the joint prompt: its kernels at the shapes of a T5-base and of a Llama-2-7B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..joint_prompt import launchers as launchers
from ..joint_prompt.configs import Sizes, aot_case, heuristic, key
from ..joint_prompt.reference import joint_prompt_backward_reference, joint_prompt_reference
from ..launch import AotCase, Config, Tunable, grid, in_float64, padded

_BACKWARD = ("joint_prompt_backward", launchers.joint_prompt_backward, joint_prompt_backward_reference)

# kernel: (operator, its launcher, its reference, candidates). A backward kernel takes the compiler many seconds.
KERNELS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], list[Config]]] = {
    "joint_prompt_products": (*_BACKWARD, grid(BLOCK_N=(16, 32, 64), BLOCK_K=(16, 32))),
    "joint_prompt": (
        "joint_prompt",
        launchers.joint_prompt,
        joint_prompt_reference,
        grid(BLOCK_D=(32, 64, 128), PARTS=(1, 2, 4), num_warps=(4, 8)),
    ),
    "joint_prompt_backward": (*_BACKWARD, grid(BLOCK_D=(16, 32), BLOCK_M=(16, 32), PARTS=(1, 2), num_warps=(4, 8))),
}

T5_BASE = Sizes(s=40, d=768, m=256, r=30, a=0, columns=8, K=4, fusion=True)
LLAMA_7B = Sizes(s=100, d=4096, m=512, r=60, a=0, columns=32, K=8, fusion=True)
PROBLEMS = (T5_BASE, LLAMA_7B, T5_BASE._replace(a=16), LLAMA_7B._replace(a=16))
REDUCED = (Sizes(s=2, d=20, m=5, r=3, a=0, columns=2, K=2, fusion=True),)

# Of the largest magnitude of a gradient, many of whose summands cancel; a wrong kernel is off by far more.
TOLERANCE = 1e-4


def tunables(reduced: bool = False) -> list[Tunable]:
    """The second launches of all problems, and the first one without maps; `reduced`: a tiny problem, a candidate."""
    return [
        _tunable(kernel, sizes, most=1 if reduced else None)
        for sizes in (REDUCED if reduced else PROBLEMS)
        for kernel in KERNELS
        if not sizes.a or kernel != "joint_prompt_products"
    ]


def _tunable(kernel: str, sizes: Sizes, most: int | None) -> Tunable:
    operator, launcher, reference, candidates = KERNELS[kernel]
    default = heuristic(kernel, sizes.d, sizes.a, sizes.r)

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        arguments = _arguments(sizes, device, seed)
        if operator == "joint_prompt":
            return arguments
        return torch.randn(sizes.s, sizes.d, device=device), *arguments

    def aot(config: Config) -> AotCase:
        return aot_case(kernel, operator, sizes, "fp32", config)

    return Tunable(
        kernel=key(kernel, sizes.a),
        size=(sizes.d, padded(sizes.r)),
        default=default,
        candidates=[config for c in candidates if (config := {**default, **c}) != default][:most],
        operator=launcher,
        inputs=inputs,
        reference=in_float64(reference),
        aot=aot,
        tolerance=TOLERANCE,
    )


def _arguments(x: Sizes, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Parameters and scales such that scores, gates and activations are of order one."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=g, device=device)

    small = x.d**-0.5
    parameters = [normal(x.s, x.d), normal(x.m, x.r), normal(x.r, x.d), normal(int(x.fusion))]
    parameters += [normal(x.d, x.a, size=small), normal(x.d, x.a, size=small)]
    parameters += [normal(x.d, x.columns, size=small), normal(x.columns, x.d), normal(x.d, x.K, size=small)]
    return *parameters, 1.3, 0.7, 2.0 / x.a**0.5 if x.a else 8.0 / x.d, "gelu"
