"""The thin autograd layer: the only place that deals with gradients.

Each function wraps one operator of `ept_kernels`. Gradients reach the prompt's parameters and, in the frozen model's
own operations, only the inputs; the frozen table gets one only if the caller made it trainable. Gradients are
first-order only: a backward with `create_graph=True` raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ept_kernels
from ept_kernels.four_bit.reference import check_operands


def _first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a backward that is itself to be differentiated.

    PyTorch's `once_differentiable` does so for `.backward()` only: with `torch.autograd.grad` it raises nothing, and a
    Hessian would be 0.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "ept's operators have no second derivatives, which create_graph=True asks for: differentiate once"
            )
        return backward(ctx, *gradients)

    return checked


class _PromptedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input_ids, positions, table, prompt, A, B, scale, adapter_ids = inputs
        # Both directions need it, so it is computed once.
        token_at = ept_kernels.token_at(positions, A.shape[-2]) if any(ctx.needs_input_grad[4:6]) else None
        ctx.save_for_backward(positions, A, B, adapter_ids, token_at, input_ids if ctx.needs_input_grad[2] else None)
        ctx.scale, ctx.table_shape, ctx.prompt_dtype = scale, table.shape, prompt.dtype
        return ept_kernels.prompted_embedding(*inputs, token_at)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        positions, A, B, adapter_ids, token_at, input_ids = ctx.saved_tensors
        grad_prompt, grad_A, grad_B = ept_kernels.prompted_embedding_backward(
            grad_output, positions, A, B, ctx.scale, adapter_ids, token_at
        )
        grad_table = None
        if input_ids is not None:
            tokens = grad_output[:, grad_output.shape[1] - positions.shape[1] :].contiguous()
            grad_table = _grad_of_table(tokens, input_ids, ctx.table_shape[0])
        return None, None, grad_table, grad_prompt.to(ctx.prompt_dtype), grad_A, grad_B, None, None


def _grad_of_table(tokens: Tensor, input_ids: Tensor, rows: int) -> Tensor:
    """Sums the gradients of tokens `[batch, n, d]` into those of a table's `rows`.

    Uses the embedding's own operator: on CUDA index_add_ gives different bits on each run. It checks no ids, so those
    outside the table (whose output was NaN) go to an extra row after it.
    """
    ids = torch.where((input_ids >= 0) & (input_ids < rows), input_ids, rows)
    return torch.ops.aten.embedding_dense_backward(tokens, ids, rows + 1, -1, False)[:rows]


class _PromptedEmbeddingByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input_ids, positions, table, prompt, W_in, _, W_out, _, scale = inputs
        out, hidden = ept_kernels.prompted_embedding_by_token(*inputs)
        ctx.save_for_backward(input_ids, positions, table, W_in if ctx.needs_input_grad[2] else None, W_out, hidden)
        ctx.scale, ctx.prompt_dtype = scale, prompt.dtype
        return out

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        input_ids, positions, table, W_in, W_out, hidden = ctx.saved_tensors
        grad_prompt, *gradients, before = ept_kernels.prompted_embedding_by_token_backward(
            grad_output, input_ids, positions, table, W_out, hidden, ctx.scale
        )
        grad_table = None
        if W_in is not None:
            tokens = grad_output[:, grad_output.shape[1] - positions.shape[1] :]
            of_update = before @ W_in.to(before.dtype).mT / ctx.scale
            tokens = tokens + torch.where((positions >= 0)[..., None], of_update, 0.0)
            grad_table = _grad_of_table(tokens.to(table.dtype), input_ids, table.shape[0])
        return None, None, grad_table, grad_prompt.to(ctx.prompt_dtype), *gradients, None


class _JointPrompt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:9])
        ctx.options = inputs[9:]
        return ept_kernels.joint_prompt(*inputs)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        gradients = ept_kernels.joint_prompt_backward(grad_output, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None for _ in ctx.options)


class _Matmul4bit(torch.autograd.Function):
    """Product that saves only the packed weight for its backward, which the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, sizes: tuple[Any, ...], *weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.sizes, ctx.bias_dtype = sizes, None if bias is None else bias.dtype
        return torch.ops.ept.matmul_4bit.default(x, *weight, bias, *sizes)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.ept.matmul_4bit_backward.default(grad_output, *ctx.saved_tensors, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            accumulated = torch.promote_types(grad_output.dtype, torch.float32)
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            grad_bias = rows.sum(0, dtype=accumulated).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    """Norm that also returns its input, so that its backward sums both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, form: str
    ) -> tuple[Tensor, Tensor]:
        out, total, rstd = ept_kernels.rms_norm(x, weight, residual, eps, form)
        h = x if residual is None else total
        ctx.save_for_backward(h, weight, rstd)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return out, h

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None) -> tuple[Any, ...]:
        grad = grad_h
        if grad_output is not None:
            grad = ept_kernels.rms_norm_backward(grad_output, *ctx.saved_tensors, grad_h, ctx.form)
        return grad, None, grad if ctx.needs_input_grad[2] else None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return ept_kernels.rotary(q, k, cos, sin, interleaved)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
        return *ept_kernels.rotary(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ept_kernels.gated_activation(gate, up, activation)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return *ept_kernels.gated_activation_backward(grad_output, *ctx.saved_tensors, ctx.activation), None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, passes = ept_kernels.relu(x)
        ctx.save_for_backward(passes)
        return out

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return ept_kernels.relu_backward(grad_output, *ctx.saved_tensors)


def prompted_embedding(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Computes `[P; W[id] + scale·A[pos]·B]`, differentiable in `prompt`, `A` and `B`.

    Shapes and dtypes as in `ept_kernels.prompted_embedding_reference`.
    """
    return _PromptedEmbedding.apply(input_ids, positions, table, prompt, A, B, scale, adapter_ids)


def prompted_embedding_by_token(
    input_ids: Tensor, positions: Tensor, table: Tensor, *parts: Tensor, scale: float
) -> Tensor:
    """Computes `[P; e + scale·(relu(e/scale·W_in + b_in)·W_out + b_out)]` for the rows `e = W[id]`.

    Differentiable in the `parts`: prompt, W_in, b_in, W_out and b_out. Shapes and dtypes as in
    `ept_kernels.prompted_embedding_by_token_reference`.
    """
    return _PromptedEmbeddingByToken.apply(input_ids, positions, table, *parts, scale)


def joint_prompt(
    *parts: Tensor, lowrank_scale: float, embedding_scale: float, score_scale: float, activation: str
) -> Tensor:
    """Computes the joint prompt `[s, d]` from prompt, A, B, beta, W_q, W_k, D, U and G, differentiable in all nine.

    Shapes and units as in `ept_kernels.joint_prompt_reference`.
    """
    return _JointPrompt.apply(*parts, lowrank_scale, embedding_scale, score_scale, activation)


def matmul_4bit(x: Tensor, weight: ept_kernels.FourBitWeight, bias: Tensor | None = None) -> Tensor:
    """Computes `x·Wᵀ + bias` with a frozen 4-bit weight, differentiable in `x` and `bias`.

    Shapes, dtypes and errors as in `ept_kernels.matmul_4bit_reference`.
    """
    check_operands(x, weight, bias)
    return _Matmul4bit.apply(x, bias, weight.sizes, *weight.tensors)


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6, form: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Computes the RMSNorm of `h = x + residual` with a frozen weight; returns it and `h`, differentiable in both.

    Use the returned `h` for later computations: its gradient is then added in the norm's own backward. Shapes, dtypes
    and forms as in `ept_kernels.rms_norm_reference`.

    Raises:
        ValueError: the weight requires a gradient.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("a frozen norm computes no gradient of its weight: set requires_grad=False on it")
    return _RMSNorm.apply(x, weight, residual, eps, form)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions' angles, differentiable in both.

    Shapes and dtypes as in `ept_kernels.rotary_reference`.
    """
    return _Rotary.apply(q, k, cos, sin, interleaved)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Computes `φ(gate) ⊙ up`, differentiable in both.

    Shapes, dtypes and names as in `ept_kernels.gated_activation_reference`.
    """
    return _GatedActivation.apply(gate, up, activation)


def relu(x: Tensor) -> Tensor:
    """Computes `max(x, 0)`, differentiable, keeping one bit per element for the backward."""
    return _ReLU.apply(x)
