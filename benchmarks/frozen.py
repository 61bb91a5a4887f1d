"""The frozen model's element-wise work, forward and input gradients together: ours, the model's own, and Liger's.

Each takes its inputs, including the gradients of its results, and returns results and input gradients. The model's own
is what transformers' Llama runs, through autograd, with no gradient for its weights. Liger computes a norm's weight
gradient regardless.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ept_kernels
from ept_kernels.problem import normal

from .shapes import Case

EPS, HEAD_WIDTH, BATCH = 1e-6, 128, 8
Outputs = tuple[Tensor, ...]


class FrozenWork(NamedTuple):
    """`inputs` by seed, and the versions of the work on them; `liger` is None if Liger is not installed."""

    inputs: Callable[[int], tuple[Any, ...]]
    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    model: Callable[..., Outputs]
    liger: Callable[..., Outputs] | None


def frozen_work(case: Case, device: str) -> FrozenWork:
    """Prepares what `case` names: `rms_norm` including the addition of the residual, `rotary` or `gated_activation`."""
    make: Callable[[Case, str], FrozenWork] = {"rms_norm": _norm, "rotary": _rotary, "gated_activation": _activation}[
        case.kernel
    ]
    return make(case, device)


def _norm(case: Case, device: str) -> FrozenWork:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rows, width = case.size["rows"], case.size["width"]

    def inputs(seed: int) -> tuple[Any, ...]:
        """Returns gradients of the norm and of the sum, `x`, residual and weight."""
        return *_drawn(case, device, seed, 4, rows, width), *_drawn(case, device, seed, 1, width)

    def run(forward: Any, backward: Any) -> Callable[..., Outputs]:
        def both(grad: Tensor, grad_h: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
            out, h, rstd = forward(x, weight, residual, EPS, "llama")
            return out, h, backward(grad, h, weight, rstd, grad_h, "llama")

        return both

    own = LlamaRMSNorm(width, eps=EPS)

    def model(grad: Tensor, grad_h: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        own.weight = torch.nn.Parameter(weight, requires_grad=False)
        h = x.detach().requires_grad_() + residual
        out = own(h)
        return out.detach(), h.detach(), *torch.autograd.grad((out, h), h, (grad, grad_h))

    ops = _liger("ops")

    def liger(grad: Tensor, grad_h: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        x = x.detach().requires_grad_()
        out, h = ops.LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)
        return out.detach(), h.detach(), *torch.autograd.grad((out, h), x, (grad, grad_h))

    ours, reference = ept_kernels.rms_norm, ept_kernels.rms_norm_reference
    backward, of_reference = ept_kernels.rms_norm_backward, ept_kernels.rms_norm_backward_reference
    return FrozenWork(inputs, run(ours, backward), run(reference, of_reference), model, liger if ops else None)


def _rotary(case: Case, device: str) -> FrozenWork:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    n, heads = case.size["rows"] // BATCH, case.size["width"] // HEAD_WIDTH

    def inputs(seed: int) -> tuple[Any, ...]:
        """Returns gradients of queries and keys, queries and keys as the products leave them, and angles."""
        of_heads = (x.transpose(1, 2) for x in _drawn(case, device, seed, 4, BATCH, n, heads, HEAD_WIDTH))
        (angles,) = _drawn(case, device, seed, 1, 1, n, HEAD_WIDTH)
        return *of_heads, angles.cos(), angles.sin()

    def run(rotate: Any) -> Callable[..., Outputs]:
        def both(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
            return *rotate(q, k, cos, sin, False, False), *rotate(grad_q, grad_k, cos, sin, False, True)

        return both

    def through_autograd(rotate: Any) -> Callable[..., Outputs]:
        def both(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
            x = [tensor.detach().requires_grad_() for tensor in (q, k)]
            out = rotate(*x, cos, sin)
            return *(tensor.detach() for tensor in out), *torch.autograd.grad(out, x, (grad_q, grad_k))

        return both

    ops = _liger("ops")
    liger = through_autograd(ops.LigerRopeFunction.apply) if ops else None
    model = through_autograd(apply_rotary_pos_emb)
    return FrozenWork(inputs, run(ept_kernels.rotary), run(ept_kernels.rotary_reference), model, liger)


def _activation(case: Case, device: str) -> FrozenWork:
    def inputs(seed: int) -> tuple[Any, ...]:
        """Returns the gradient, gate and up."""
        return _drawn(case, device, seed, 3, case.size["rows"], case.size["width"])

    def run(forward: Any, backward: Any) -> Callable[..., Outputs]:
        return lambda grad, gate, up: (forward(gate, up, "silu"), *backward(grad, gate, up, "silu"))

    def through_autograd(activate: Any) -> Callable[..., Outputs]:
        def both(grad: Tensor, gate: Tensor, up: Tensor) -> Outputs:
            x = [tensor.detach().requires_grad_() for tensor in (gate, up)]
            out = activate(*x)
            return out.detach(), *torch.autograd.grad(out, x, grad)

        return both

    ours = run(ept_kernels.gated_activation, ept_kernels.gated_activation_backward)
    reference = run(ept_kernels.gated_activation_reference, ept_kernels.gated_activation_backward_reference)
    model = through_autograd(lambda gate, up: torch.nn.functional.silu(gate) * up)
    ops = _liger("ops")
    liger = through_autograd(ops.LigerSiLUMulFunction.apply) if ops else None
    return FrozenWork(inputs, ours, reference, model, liger)


def _drawn(case: Case, device: str, seed: int, count: int, *shape: int) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(seed)
    return tuple(normal(g, *shape).to(getattr(torch, case.dtype)) for _ in range(count))


def _liger(module: str) -> Any:
    try:
        return importlib.import_module(f"liger_kernel.{module}")
    except ImportError:
        return None
