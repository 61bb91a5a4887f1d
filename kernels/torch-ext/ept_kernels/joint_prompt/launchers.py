"""Launchers of the joint prompt and its backward, two launches each, and their choices.

No atomics, every sum in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import Config, all_registers, cached_choice, config_for, launch, on_device, padded, precision
from .backward import joint_prompt_backward_kernel
from .forward import joint_prompt_kernel
from .products import joint_prompt_products_kernel
from .shape import Shape

# Meta-parameters by kernel, used where nothing was measured. The first launch, of the inner products, belongs to both
# operators; BLOCK_M and PARTS of the second one hold for it too.
_BACKWARD = {"BLOCK_S": 16, "BLOCK_D": 32, "BLOCK_M": 32, "BLOCK_R": 16, "PARTS": 2, "num_warps": 4, "num_stages": 1}
CONFIGS: dict[str, Config] = {
    "joint_prompt_products": {"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    "joint_prompt": {"BLOCK_S": 16, "BLOCK_D": 64, "BLOCK_M": 32, "PARTS": 2, "num_warps": 4, "num_stages": 1},
    "joint_prompt_backward": _BACKWARD,
}
# Up to this width the programs take narrower tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024
# From this rank on the backward reads inner products in a single part.
LARGE_RANK = 33


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
    """Computes `ept_kernels.joint_prompt_reference` in two launches, one with neither fusion nor spaces."""
    out = prompt.new_empty(prompt.shape)
    if not out.numel():
        return out
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    z, products_options, options = _chosen("joint_prompt", _sizes(*parameters), activation, prompt.device)
    prompt, A, B, beta, W_q, W_k, D, U, G = _plain(*parameters)
    scales = (float(lowrank_scale), float(embedding_scale), float(score_scale))
    with on_device(prompt):
        products = _products(z, products_options, prompt, None, A, B, W_q, W_k, D, U, G)
        launch(joint_prompt_kernel, z.forward_grid, prompt, A, B, beta, U, products, out, *scales, z, **options)
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
    """Computes `ept_kernels.joint_prompt_backward_reference` in two launches, one with neither fusion nor spaces.

    Gradients of parameters that have elements but no part in the result (`A` without fusion) are filled with zeros.
    """
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    z, products_options, options = _chosen("joint_prompt_backward", _sizes(*parameters), activation, prompt.device)
    computed = (True, z.m > 0, z.m > 0, z.fusion, z.a > 0, z.a > 0, z.columns > 0, z.columns > 0, z.K > 0)
    if not prompt.numel():
        return tuple(x.new_zeros(x.shape) for x in parameters)
    gradients = tuple((x.new_empty if on else x.new_zeros)(x.shape) for x, on in zip(parameters, computed, strict=True))
    grad_output, prompt, A, B, beta, W_q, W_k, D, U, G = _plain(grad_output, *parameters)
    tensors = (grad_output, prompt, A, B, beta, W_q, W_k, D, G)
    scales = (float(lowrank_scale), float(embedding_scale), float(score_scale))
    with on_device(prompt):
        products = _products(z, products_options, prompt, grad_output, A, B, W_q, W_k, D, U, G)
        launch(joint_prompt_backward_kernel, z.backward_grid, *tensors, products, *gradients, *scales, z, **options)
    return gradients


def _sizes(prompt: Tensor, A: Tensor, B: Tensor, beta: Tensor, W_q: Tensor, *others: Tensor) -> tuple[int, ...]:
    """Reads s, d, m, r, a, columns, K and whether there is a fusion off the parameters."""
    _W_k, D, _U, G = others
    return *prompt.shape, *A.shape, W_q.shape[1], D.shape[1], G.shape[1], beta.numel()


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Makes tensors contiguous and of one dtype, since a program chooses among them. Usually they are, and nothing is
    copied.
    """
    if len({x.dtype for x in tensors}) > 1:
        tensors = tuple(x.float() for x in tensors)
    return tuple(x.contiguous() for x in tensors)


def _products(
    z: Shape, options: dict[str, int], prompt: Tensor, grad_output: Tensor | None, *parameters: Tensor
) -> Tensor:
    """Launches the first kernel, where anything needs it."""
    if not (z.fusion or z.columns):
        return prompt.new_empty(0, dtype=torch.float32)
    products = prompt.new_empty(z.parts, z.size, dtype=torch.float32)
    launch(joint_prompt_products_kernel, z.products_grid, prompt, grad_output, *parameters, products, z, **options)
    return products


@cached_choice
def _chosen(kernel: str, sizes: tuple[int, ...], activation: str, device: torch.device) -> tuple[Shape, Config, Config]:
    """Chooses what both launches of the operator `kernel` are compiled for, and warps and stages of each."""
    s, d, m, r, a, columns, K, fusion = sizes
    names = ("joint_prompt_products", kernel)
    configs = [config_for(key(name, a), (d, padded(r)), device, heuristic(name, d, a, r)) for name in names]
    products, second = ({k: c[k] for k in ("num_warps", "num_stages")} | all_registers(device) for c in configs)
    # What is switched off has the size 0: an update that nothing attends to, a gate without spaces, …
    if not (fusion and m and r):
        m = r = 0
    blocks = {"BLOCK_R": 16, **configs[0], **configs[1]}
    blocks = {name: value for name, value in blocks.items() if name not in second}
    for name, size in {"BLOCK_R": r, "BLOCK_S": s, "BLOCK_M": m, "BLOCK_D": d}.items():
        blocks[name] = min(blocks[name], padded(size))
    z = Shape(
        s=s,
        d=d,
        m=m,
        r=r,
        a=a if fusion else 0,
        columns=columns,
        K=K if columns else 0,
        fusion=fusion > 0,
        backward=kernel == "joint_prompt_backward",
        activation=activation,
        PRECISION=precision(torch.float32, device),
        **blocks,
    )
    return z, products, second


def heuristic(kernel: str, d: int, a: int = 0, r: int = 0) -> Config:
    """Chooses meta-parameters of `kernel` at width `d` and rank `r`, maps of width `a`, where nothing was measured.

    With maps or a large rank the kernels hold more at a time; larger tiles, or sums of several parts, would overflow
    the registers.
    """
    config = dict(CONFIGS[kernel])
    if kernel == "joint_prompt" and d <= NARROW:
        config["BLOCK_D"] = 32
    if "PARTS" in config and (a or (kernel == "joint_prompt_backward" and r >= LARGE_RANK)):
        config["PARTS"] = 1
    if kernel == "joint_prompt_backward" and a:
        config |= {"BLOCK_D": 16, "BLOCK_M": 16, "num_warps": 8}
    return config


def key(kernel: str, a: int) -> str:
    """Names `kernel` in a file of measured configurations, with maps of width `a`: they need smaller tiles."""
    return f"{kernel}/maps" if a and kernel != "joint_prompt_products" else kernel
