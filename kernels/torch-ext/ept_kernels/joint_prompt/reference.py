"""The joint prompt `P = F + M`: the fusion of both knowledge sources plus the gated spaces, and its backward.

In units of ρ, the root mean square of the embedding table, with `c` the scale of the low-rank part:

    P̂ = rms_normalise(p)                                     [s, d]
    q, k = P̂·W_q, rms_normalise([c·A·B; p])·W_k               [s, a], [m + s, a]
    ω = softmax(σ·q·kᵀ)                                       [s, m + s]
    F = p + β·ω·[c·A·B; p]                                    [s, d]
    M = (φ(P̂·D) ⊙ softmax(P̂·G))·U                            [s, d]    K spaces of width h are K·h columns
    P = ρ·(F + M)

`A·B` is never built: scores on it are `((q·(B·W_k)ᵀ)·Aᵀ)`, its rows' norms are `A·(B·Bᵀ)·Aᵀ`, and what the
attention takes from it is `(ω·A)·B`. The form of fusion and spaces is this project's reconstruction of the method.

Parts that are switched off are tensors with an empty dimension: `beta` of no elements, `D` with no columns,
`W_q` with no columns (then q and k are the normalised rows themselves), `A` of rank 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import Choices, autograd_inside_operators, compute_dtype, register

# φ by name.
ACTIVATIONS = Choices("activation", gelu=F.gelu, relu=torch.relu, silu=F.silu, tanh=torch.tanh, linear=lambda x: x)

SHAPES = "prompt s d, A m r, B r d, beta is_fused, W_q d a, W_k d a, D d columns, U columns d, G d K, grad_output s d"

# Keeps the normalisation of an all-zero row, and its gradient, finite: C is zero at the start.
NORM_EPS = 1e-6


def joint_prompt_reference(
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
    """Computes the joint prompt `P` `[s, d]`, in the units of the embedding table.

    Args:
        prompt: `[s, d]` the short prompt `p`, in units of ρ.
        A: `[m, r]`; B: `[r, d]`: the low-rank update; `r = 0` leaves it out of the fusion.
        beta: `[1]` the fusion's weight, or `[0]` for no fusion.
        W_q, W_k: `[d, a]` maps of queries and keys, or `[d, 0]` for none.
        D: `[d, K·h]`; U: `[K·h, d]`: the spaces; `K·h = 0` for none.
        G: `[d, K]` the gate, or `[d, 0]` for a single space, which needs none.
        lowrank_scale: `c = α/√r`. embedding_scale: `ρ`. score_scale: `σ`, usually `1/√a`.
        activation: φ, one of `gelu` (exact), `relu`, `silu`, `tanh`, `linear`.

    Returns:
        `[s, d]` in the dtype of `prompt`, computed in float32 (float64 for float64 inputs).
    """
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    dtype = compute_dtype(*parameters)
    p, A, B, beta, W_q, W_k, D, U, G = (x.to(dtype) for x in parameters)
    p_hat = p * torch.rsqrt(p.square().mean(1, keepdim=True) + NORM_EPS)
    joint = p
    if beta.numel():
        joint = joint + beta.view(1) * _attended(p, p_hat, A, B, W_q, W_k, lowrank_scale, score_scale)
    if D.shape[1]:
        hidden = ACTIVATIONS[activation](p_hat @ D)  # [s, K·h]
        if G.shape[1]:
            gate = torch.softmax(p_hat @ G, dim=1)  # [s, K]
            hidden = hidden * gate.repeat_interleave(D.shape[1] // G.shape[1], dim=1)
        joint = joint + hidden @ U
    return (embedding_scale * joint).to(prompt.dtype).contiguous()


def _attended(
    p: Tensor, p_hat: Tensor, A: Tensor, B: Tensor, W_q: Tensor, W_k: Tensor, c: float, score_scale: float
) -> Tensor:
    """Computes `Z = ω·[c·A·B; p]` `[s, d]` without building `A·B`."""
    m, has_update, has_maps = A.shape[0], A.shape[1] > 0, W_q.shape[1] > 0
    query, key_p, key_B = (p_hat @ W_q, p_hat @ W_k, B @ W_k) if has_maps else (p_hat, p_hat, B)
    scores = query @ key_p.mT  # [s, s]
    if not has_update:
        return torch.softmax(score_scale * scores, dim=1) @ p
    # If B's rows cancel, terms do too, and rounding may leave less than zero.
    mean_square_C = (c * c / p.shape[1]) * ((A @ (B @ B.mT)) * A).sum(1).clamp_min(0)  # [m]
    scores_C = c * ((query @ key_B.mT) @ A.mT) * torch.rsqrt(mean_square_C + NORM_EPS)  # [s, m]
    weights = torch.softmax(score_scale * torch.cat([scores_C, scores], dim=1), dim=1)  # ω [s, m + s]
    return c * ((weights[:, :m] @ A) @ B) + weights[:, m:] @ p


def joint_prompt_backward_reference(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Differentiates `joint_prompt_reference` of the same arguments, by autograd.

    Returns the gradients of `prompt, A, B, beta, W_q, W_k, D, U, G` for `grad_output` `[s, d]`, which is any floating
    type. Each has the shape and dtype of its parameter. A part that is switched off gets an empty one, a parameter that
    has elements but no part in the result (`A` without fusion) zeros.
    """
    with autograd_inside_operators():
        parameters = [x.detach().requires_grad_() for x in arguments[:9]]
        # The result before it is rounded to the prompt's dtype, because rounding is not differentiated.
        dtype = compute_dtype(*parameters)
        joint = joint_prompt_reference(*(x.to(dtype) for x in parameters), *arguments[9:])
        gradients = torch.autograd.grad(joint, parameters, grad_output.to(dtype), allow_unused=True)
    return tuple((torch.zeros_like(x) if g is None else g).contiguous() for g, x in zip(gradients, parameters))


def _fake(prompt, *others):
    return torch.empty_like(prompt, memory_format=torch.contiguous_format)


def _backward_fake(grad_output, *arguments):
    return tuple(_fake(x) for x in arguments[:9])


_PARAMETERS = (
    "Tensor prompt, Tensor A, Tensor B, Tensor beta, Tensor W_q, Tensor W_k, Tensor D, Tensor U, Tensor G, "
    'float lowrank_scale, float embedding_scale, float score_scale, str activation="gelu"'
)
joint_prompt = register(
    f"joint_prompt({_PARAMETERS}) -> Tensor", joint_prompt_reference, _fake, "joint_prompt.launchers", SHAPES
)
joint_prompt_backward = register(
    f"joint_prompt_backward(Tensor grad_output, {_PARAMETERS}) -> ({', '.join(['Tensor'] * 9)})",
    joint_prompt_backward_reference,
    _backward_fake,
    "joint_prompt.launchers",
    SHAPES,
)
