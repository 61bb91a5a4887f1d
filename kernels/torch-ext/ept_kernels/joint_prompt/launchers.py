"""Launchers of the joint prompt and its backward: at most four launches and five, no atomics, sums in a fixed order.

`products.py` (everything reduced over d, in parts, then added up), `rows.py` (scores, softmax, gates, spaces), in the
backward `sides.py` (sums over rows and columns), `expand.py` (everything as wide as d). All sizes but d and the number
of gates are run-time arguments: one compiled kernel serves every prompt length, input length and rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import (
    Config,
    all_registers,
    architecture,
    cached_choice,
    config_for,
    launch,
    on_device,
    padded,
    precision,
)
from .expand import joint_prompt_backward_kernel, joint_prompt_kernel
from .products import UNIT, joint_prompt_products_kernel, joint_prompt_sum_kernel
from .rows import STATS, joint_prompt_rows_kernel
from .sides import joint_prompt_sides_kernel

# Meta-parameters by kernel, used where nothing was measured. PROGRAMS: how many programs of products are wanted, which
# decides the number of parts.
CONFIGS: dict[str, Config] = {
    "joint_prompt_products": {"BLOCK_K": 32, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
    "joint_prompt_sum": {"num_warps": 4, "num_stages": 1},
    "joint_prompt_rows": {"BLOCK_S": 16, "num_warps": 8, "num_stages": 1},
    "joint_prompt_sides": {"BLOCK_S": 16, "num_warps": 8, "num_stages": 1},
    "joint_prompt": {"BLOCK_S": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 1},
    "joint_prompt_backward": {"BLOCK_D": 64, "num_warps": 8, "num_stages": 1},
}


def joint_prompt(
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    beta: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    D: Tensor,
    U: Tensor,
    G: Tensor,
    lowrank_scale: float,
    embedding_scale: float,
    score_scale: float,
    activation: str = "gelu",
) -> Tensor:
    """Computes `ept_kernels.joint_prompt_reference` in four launches, in none without fusion and spaces."""
    z = _Sizes.of(prompt, A, beta, W_q, D, G, backward=False)
    if not prompt.numel() or not (z.fusion or z.columns):
        return embedding_scale * prompt
    out = prompt.new_empty(prompt.shape)
    prompt, A, B, beta, W_q, W_k, D, U, G = _plain(prompt, A, B, beta, W_q, W_k, D, U, G)
    scales = (float(lowrank_scale), float(embedding_scale), float(score_scale))
    with on_device(prompt):
        w = _rows(z, activation, scales, prompt, prompt, A, B, W_q, W_k, D, G, U)
        options = _options("joint_prompt", z.d, prompt.device)
        grid = (triton.cdiv(z.d, options["BLOCK_D"]), triton.cdiv(z.s, options["BLOCK_S"]))
        launch(
            joint_prompt_kernel,
            grid,
            *(prompt, A, B, U, beta, w.scores, w.stats, w.sides, out),
            *scales,
            *(z.s, z.m, z.r, z.columns, z.d, z.side_width),
            FUSION=z.fusion,
            **options,
        )
    return out


def joint_prompt_backward(
    grad_output: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    beta: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    D: Tensor,
    U: Tensor,
    G: Tensor,
    lowrank_scale: float,
    embedding_scale: float,
    score_scale: float,
    activation: str = "gelu",
) -> tuple[Tensor, ...]:
    """Computes `ept_kernels.joint_prompt_backward_reference` in five launches, four without fusion.

    Gradients of parameters that have elements but no part in the result (`A` without fusion) are filled with zeros.
    """
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    z = _Sizes.of(prompt, A, beta, W_q, D, G, backward=True)
    is_used = (True, z.m > 0, z.m > 0, z.fusion, z.a > 0, z.a > 0, z.columns > 0, z.columns > 0, z.K > 0)
    if not prompt.numel() or not (z.fusion or z.columns):
        grad = (embedding_scale * grad_output).to(prompt.dtype)
        return grad, *(x.new_zeros(x.shape) for x in parameters[1:])
    gradients = [(x.new_empty if used else x.new_zeros)(x.shape) for x, used in zip(parameters, is_used, strict=True)]
    grad_prompt, grad_A, grad_B, grad_beta, grad_W_q, grad_W_k, grad_D, grad_U, grad_G = gradients
    grad_output, prompt, A, B, beta, W_q, W_k, D, U, G = _plain(grad_output, *parameters)
    scales = (float(lowrank_scale), float(embedding_scale), float(score_scale))
    with on_device(prompt):
        w = _rows(z, activation, scales, prompt, grad_output, A, B, W_q, W_k, D, G, U)
        sizes = (z.s, z.m, z.r, z.a, z.columns, z.K, z.d)
        if z.fusion:
            options = _options("joint_prompt_sides", z.d, prompt.device)
            launch(
                joint_prompt_sides_kernel,
                (triton.cdiv(z.m, UNIT) + _up(z.s) // options["BLOCK_S"],),
                *(w.products, A, beta, w.scores, w.slopes, w.inverse_rms_C, w.stats, w.sides, w.gram_parts),
                *(grad_A, grad_beta, *scales, *sizes, z.width, z.side_width),
                MAPS=z.a > 0,
                **options,
            )
        options = _options("joint_prompt_backward", z.d, prompt.device)
        tiles = (_up(z.s) + _up(z.r) + 2 * _up(z.a) + 2 * _up(z.columns) + _up(z.K)) // UNIT
        launch(
            joint_prompt_backward_kernel,
            (triton.cdiv(z.d, options["BLOCK_D"]), tiles),
            *(prompt, grad_output, A, B, beta, W_q, W_k, D, G),
            *(w.scores, w.slopes, w.stats, w.sides, w.gram_parts),
            *(grad_prompt, grad_B, grad_W_q, grad_W_k, grad_D, grad_U, grad_G),
            *(*scales, *sizes, z.side_width),
            FUSION=z.fusion,
            MAPS=z.a > 0,
            **options,
        )
    return tuple(gradients)


class _Sizes(NamedTuple):
    """Sizes of a joint prompt, 0 for what is switched off."""

    s: int
    d: int
    m: int
    r: int
    a: int
    columns: int  # K·h
    K: int
    fusion: bool
    backward: bool

    @classmethod
    def of(cls, prompt: Tensor, A: Tensor, beta: Tensor, W_q: Tensor, D: Tensor, G: Tensor, backward: bool) -> _Sizes:
        (s, d), (m, r), fusion, columns = prompt.shape, A.shape, beta.numel() > 0, D.shape[1]
        if not (fusion and m and r):
            m = r = 0
        a, K = W_q.shape[1] if fusion else 0, G.shape[1] if columns else 0
        return cls(s, d, m, r, a, columns, K, fusion, backward)

    @property
    def rows(self) -> int:
        """Rows of the matrix of inner products: those of p, B, and in the backward of the gradient."""
        return _up(self.s) * (1 + self.backward) + _up(self.r)

    @property
    def width(self) -> int:
        """Its columns: those of p, B, W_q, W_k, D, G, and in the backward U."""
        spaces = _up(self.columns) * (1 + self.backward) + _up(self.K)
        return _up(self.s) + _up(self.r) + 2 * _up(self.a) + spaces

    @property
    def side_width(self) -> int:
        """Columns of the small matrices that the expansion takes: see `rows.py`."""
        spaces = _up(self.columns) * (1 + self.backward)
        return spaces + self.backward * (_up(self.K) + 2 * _up(self.r) + 2 * _up(self.a))


class _Workspace(NamedTuple):
    """Tensors that the launches hand on, float32, each padded to whole tiles."""

    products: Tensor  # [rows, width]
    scores: Tensor  # [up(s), up(m) + up(s)]
    slopes: Tensor  # as scores; empty in the forward
    inverse_rms_C: Tensor  # [up(m)]
    stats: Tensor  # [STATS, up(s)]
    sides: Tensor  # [up(s), side_width]
    gram_parts: Tensor  # [tiles of m, up(r), up(r) + up(a)]; empty in the forward
    partial: Tensor  # [parts, rows, width]


def _rows(
    z: _Sizes,
    activation: str,
    scales: tuple[float, float, float],
    prompt: Tensor,
    grad_output: Tensor,
    A: Tensor,
    B: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    D: Tensor,
    G: Tensor,
    U: Tensor,
) -> _Workspace:
    """Allocates and launches what both directions begin with: inner products, scores and spaces of the rows."""
    device = prompt.device
    options = _options("joint_prompt_products", z.d, device)
    tiles, block = z.rows // UNIT * (z.width // UNIT), options["BLOCK_K"]
    parts = min(triton.cdiv(options.pop("PROGRAMS"), tiles), triton.cdiv(z.d, block))
    depth = triton.cdiv(triton.cdiv(z.d, parts), block) * block
    parts = triton.cdiv(z.d, depth)
    scores = _up(z.s) * (_up(z.m) + _up(z.s)) if z.fusion else 0
    grams = z.backward * z.m and triton.cdiv(z.m, UNIT) * _up(z.r) * (_up(z.r) + _up(z.a))
    sizes = (scores, z.backward * scores, _up(z.m), STATS * _up(z.s), _up(z.s) * z.side_width, grams)
    products = z.rows * z.width
    workspace = prompt.new_empty(products + sum(sizes) + parts * products, dtype=torch.float32)
    w = _Workspace(*workspace.split([products, *sizes, parts * products]))
    launch(
        joint_prompt_products_kernel,
        (z.width // UNIT, z.rows // UNIT, parts),
        *(prompt, B, grad_output, W_q, W_k, D, G, U, w.partial),
        *(z.s, z.r, z.a, z.columns, z.K, z.d, depth),
        **options,
    )
    launch(
        joint_prompt_sum_kernel,
        (z.width // UNIT, z.rows // UNIT),
        *(w.partial, w.products, w.stats),
        *(parts, z.s, z.r, z.a, z.columns, z.K, z.d),
        MAPS=z.a > 0,
        **_options("joint_prompt_sum", z.d, device),
    )
    options = _options("joint_prompt_rows", z.d, device)
    launch(
        joint_prompt_rows_kernel,
        (_up(z.s) // options["BLOCK_S"],),
        *(w.products, A, w.scores, w.slopes, w.inverse_rms_C, w.stats, w.sides, *scales),
        *(z.s, z.m, z.r, z.a, z.columns, z.K, z.d, z.width, z.side_width),
        GATES=max(32, padded(z.K)) if z.columns else 0,
        ACTIVATION=activation,
        FUSION=z.fusion,
        BACKWARD=z.backward,
        **options,
    )
    return w


def _up(size: int) -> int:
    return triton.cdiv(size, UNIT) * UNIT


@cached_choice
def _chosen(kernel: str, d: int, device: torch.device) -> dict[str, Any]:
    config = config_for(kernel, (d,), device, heuristic(kernel, device))
    return {**config, "PRECISION": precision(torch.float32, device), **all_registers(device)}


def _options(kernel: str, d: int, device: torch.device) -> dict[str, Any]:
    """Returns the meta-parameters of `kernel`, in a new dictionary each time."""
    return dict(_chosen(kernel, d, device))


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Makes tensors contiguous and of one dtype, since a program chooses among them; usually nothing is copied."""
    if len({x.dtype for x in tensors}) > 1:
        tensors = tuple(x.float() for x in tensors)
    return tuple(x.contiguous() for x in tensors)


def heuristic(kernel: str, device: torch.device) -> Config:
    """Chooses meta-parameters of `kernel` where nothing was measured."""
    config = dict(CONFIGS[kernel])
    if architecture(device) in ("gfx942", "hip"):
        config["num_warps"] = 4  # twice as many threads in a warp
    return config
