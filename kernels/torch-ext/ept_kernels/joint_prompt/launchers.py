"""Launchers of the joint prompt and its backward: two launches each, no atomics, every sum in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import launch, on_device
from .backward import joint_prompt_backward_kernel
from .configs import Sizes, chosen
from .forward import joint_prompt_kernel
from .products import joint_prompt_products_kernel
from .shape import Shape


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
    """`ept_kernels.joint_prompt_reference` in two launches, one with neither fusion nor spaces."""
    out = prompt.new_empty(prompt.shape)
    if not out.numel():
        return out
    z, products_options, options = chosen(
        "joint_prompt", _sizes_of(prompt, A, beta, W_q, D, G), activation, prompt.device
    )
    prompt, A, B, beta, W_q, W_k, D, U, G = _plain(prompt, A, B, beta, W_q, W_k, D, U, G)
    with on_device(prompt):
        products = _products(z, products_options, prompt, None, A, B, W_q, W_k, D, U, G)
        launch(
            joint_prompt_kernel,
            z.forward_grid,
            prompt,
            A,
            B,
            beta,
            U,
            products,
            out,
            float(lowrank_scale),
            float(embedding_scale),
            float(score_scale),
            z,
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
    """`ept_kernels.joint_prompt_backward_reference` in two launches, one with neither fusion nor spaces.

    Gradients of parameters that have elements but no part in the result (`A` without fusion) are filled with zeros.
    """
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    sizes = _sizes_of(prompt, A, beta, W_q, D, G)
    z, products_options, options = chosen("joint_prompt_backward", sizes, activation, prompt.device)
    computed = (True, z.m > 0, z.m > 0, z.fusion, z.a > 0, z.a > 0, z.columns > 0, z.columns > 0, z.K > 0)
    if not prompt.numel():
        computed = (False,) * 9
    gradients = tuple((x.new_empty if on else x.new_zeros)(x.shape) for x, on in zip(parameters, computed, strict=True))
    if not prompt.numel():
        return gradients
    grad_output, prompt, A, B, beta, W_q, W_k, D, U, G = _plain(grad_output, *parameters)
    with on_device(prompt):
        products = _products(z, products_options, prompt, grad_output, A, B, W_q, W_k, D, U, G)
        launch(
            joint_prompt_backward_kernel,
            z.backward_grid,
            grad_output,
            prompt,
            A,
            B,
            beta,
            W_q,
            W_k,
            D,
            G,
            products,
            *gradients,
            float(lowrank_scale),
            float(embedding_scale),
            float(score_scale),
            z,
            **options,
        )
    return gradients


def _sizes_of(prompt: Tensor, A: Tensor, beta: Tensor, W_q: Tensor, D: Tensor, G: Tensor) -> Sizes:
    (s, d), (m, r) = prompt.shape, A.shape
    return Sizes(s, d, m, r, W_q.shape[1], D.shape[1], G.shape[1], fusion=beta.numel() > 0)


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, and of one dtype, since a program chooses among them: usually they are, and nothing is copied."""
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1:
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
