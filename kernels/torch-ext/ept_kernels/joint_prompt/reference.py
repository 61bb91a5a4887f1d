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

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import register
from ..prompted_embedding.reference import compute_dtype

ACTIVATIONS = ("gelu", "relu", "silu", "tanh", "linear")

# Keeps the normalisation of an all-zero row finite, and its gradient too: C is zero at the start.
NORM_EPS = 1e-6


class _Spaces(NamedTuple):
    before: Tensor  # P̂·D          [s, K·h]
    hidden: Tensor  # φ(P̂·D)       [s, K·h]
    gate: Tensor  # softmax(P̂·G)   [s, K]


class _Fusion(NamedTuple):
    query: Tensor  # [s, a]
    key_prompt: Tensor  # [s, a]
    key_B: Tensor  # [r, a]
    weights: Tensor  # ω            [s, m + s]
    scores_rank: Tensor  # q·key_Bᵀ  [s, r]
    inverse_rms_C: Tensor  # [m]


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
    """The joint prompt `P` `[s, d]`, in the units of the embedding table.

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
    out_dtype = prompt.dtype
    p, A, B, beta, W_q, W_k, D, U, G = _in_compute_dtype(prompt, A, B, beta, W_q, W_k, D, U, G)
    p_hat = p * _inverse_rms(p)
    joint = p
    if beta.numel():
        fusion = _fusion(p, p_hat, A, B, W_q, W_k, lowrank_scale, score_scale)
        joint = joint + beta * _attended(fusion.weights, p, A, B, lowrank_scale)
    if D.shape[1]:
        spaces = _spaces(p_hat, D, G, activation)
        joint = joint + (spaces.hidden * _per_column(spaces.gate, D)) @ U
    return (embedding_scale * joint).to(out_dtype)


def joint_prompt_backward_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `prompt, A, B, beta, W_q, W_k, D, U, G` for `grad_output` `[s, d]`; nothing but the inputs is
    kept.

    Every gradient has the shape and dtype of its parameter; a part that is switched off gets an empty one.
    """
    inputs = (prompt, A, B, beta, W_q, W_k, D, U, G)
    p, A, B, beta, W_q, W_k, D, U, G = _in_compute_dtype(*inputs)
    d = p.shape[1]
    inverse_rms = _inverse_rms(p)
    p_hat = p * inverse_rms
    grad_joint = embedding_scale * grad_output.to(p.dtype)  # [s, d]
    grad_p, grad_p_hat = grad_joint.clone(), torch.zeros_like(p)
    grad_A, grad_B, grad_beta = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(beta)
    grad_W_q, grad_W_k = torch.zeros_like(W_q), torch.zeros_like(W_k)
    grad_D, grad_U, grad_G = torch.zeros_like(D), torch.zeros_like(U), torch.zeros_like(G)

    if beta.numel():
        c = lowrank_scale
        f = _fusion(p, p_hat, A, B, W_q, W_k, c, score_scale)
        m = A.shape[0] if A.shape[1] else 0
        weights_C, weights_p = f.weights[:, :m], f.weights[:, m:]
        # Z = c·(ω_C·A)·B + ω_p·p
        along_B, along_p = grad_joint @ B.mT, grad_joint @ p.mT  # [s, r], [s, s]
        grad_weights = torch.cat([c * (along_B @ A[:m].mT), along_p], dim=1)  # of Z·grad, without β
        grad_beta = (f.weights * grad_weights).sum().reshape(1)
        grad_p += beta * (weights_p.mT @ grad_joint)
        grad_B += beta * c * ((weights_C @ A[:m]).mT @ grad_joint)
        grad_A[:m] += beta * c * (weights_C.mT @ along_B)
        # softmax
        grad_weights = beta * grad_weights
        grad_scores = f.weights * (grad_weights - (f.weights * grad_weights).sum(1, keepdim=True))
        grad_scores = score_scale * grad_scores
        grad_scores_C, grad_scores_p = grad_scores[:, :m], grad_scores[:, m:]
        grad_query = grad_scores_p @ f.key_prompt
        grad_key_prompt = grad_scores_p.mT @ f.query
        grad_key_B = torch.zeros_like(f.key_B)
        if m:
            # scores_C = c·(T·Aᵀ)·n, T = q·key_Bᵀ, n = (c²·A(BBᵀ)Aᵀ/d + ε)^(-1/2)
            grad_product = c * grad_scores_C * f.inverse_rms_C
            grad_inverse = c * (grad_scores_C * (f.scores_rank @ A.mT)).sum(0)  # [m]
            grad_mean_square = -0.5 * grad_inverse * f.inverse_rms_C**3
            grad_T = grad_product @ A
            gram = B @ B.mT
            weighted_A = (2 * c * c / d) * grad_mean_square[:, None] * A
            grad_A += grad_product.mT @ f.scores_rank + weighted_A @ gram
            grad_B += (A.mT @ weighted_A) @ B
            grad_query = grad_query + grad_T @ f.key_B
            grad_key_B = grad_T.mT @ f.query
        if W_q.shape[1]:
            grad_W_q += p_hat.mT @ grad_query
            grad_W_k += p_hat.mT @ grad_key_prompt + B.mT @ grad_key_B
            grad_p_hat += grad_query @ W_q.mT + grad_key_prompt @ W_k.mT
            grad_B += grad_key_B @ W_k.mT
        else:
            grad_p_hat += grad_query + grad_key_prompt
            grad_B += grad_key_B

    if D.shape[1]:
        spaces = _spaces(p_hat, D, G, activation)
        gate = _per_column(spaces.gate, D)
        grad_U += (spaces.hidden * gate).mT @ grad_joint
        grad_gated = grad_joint @ U.mT  # [s, K·h]
        grad_before = _activation_backward(activation, spaces.before, grad_gated * gate)
        grad_D += p_hat.mT @ grad_before
        grad_p_hat += grad_before @ D.mT
        if G.shape[1]:
            grad_gate = (grad_gated * spaces.hidden).unflatten(1, (G.shape[1], -1)).sum(-1)  # [s, K]
            grad_logits = spaces.gate * (grad_gate - (spaces.gate * grad_gate).sum(1, keepdim=True))
            grad_G += p_hat.mT @ grad_logits
            grad_p_hat += grad_logits @ G.mT

    grad_p += inverse_rms * (grad_p_hat - p_hat * (grad_p_hat * p_hat).mean(1, keepdim=True))
    gradients = (grad_p, grad_A, grad_B, grad_beta, grad_W_q, grad_W_k, grad_D, grad_U, grad_G)
    return tuple(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))  # type: ignore[return-value]


def _in_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = compute_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def _inverse_rms(rows: Tensor) -> Tensor:
    return torch.rsqrt(rows.square().mean(1, keepdim=True) + NORM_EPS)


def _fusion(
    p: Tensor, p_hat: Tensor, A: Tensor, B: Tensor, W_q: Tensor, W_k: Tensor, c: float, score_scale: float
) -> _Fusion:
    mapped = W_q.shape[1] > 0
    query = p_hat @ W_q if mapped else p_hat
    key_prompt = p_hat @ W_k if mapped else p_hat
    key_B = B @ W_k if mapped else B
    scores = query @ key_prompt.mT  # [s, s]
    scores_rank = query @ key_B.mT  # [s, r]
    mean_square_C = (c * c / p.shape[1]) * ((A @ (B @ B.mT)) * A).sum(1)
    inverse_rms_C = torch.rsqrt(mean_square_C + NORM_EPS)
    if A.shape[1]:
        scores_C = c * (scores_rank @ A.mT) * inverse_rms_C  # [s, m]
        scores = torch.cat([scores_C, scores], dim=1)
    weights = torch.softmax(score_scale * scores, dim=1)
    return _Fusion(query, key_prompt, key_B, weights, scores_rank, inverse_rms_C)


def _attended(weights: Tensor, p: Tensor, A: Tensor, B: Tensor, c: float) -> Tensor:
    """`Z = ω·[c·A·B; p]` without building `A·B`."""
    if not A.shape[1]:
        return weights @ p
    m = A.shape[0]
    return c * ((weights[:, :m] @ A) @ B) + weights[:, m:] @ p


def _spaces(p_hat: Tensor, D: Tensor, G: Tensor, activation: str) -> _Spaces:
    before = p_hat @ D
    gate = torch.softmax(p_hat @ G, dim=1) if G.shape[1] else p_hat.new_ones(p_hat.shape[0], 1)
    return _Spaces(before, _activate(activation, before), gate)


def _per_column(gate: Tensor, D: Tensor) -> Tensor:
    """A gate a space `[s, K]` as a gate a column `[s, K·h]`."""
    return gate.repeat_interleave(D.shape[1] // gate.shape[1], dim=1)


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "linear":
        return x
    return torch.tanh(x) if name == "tanh" else getattr(F, name)(x)


def _activation_backward(name: str, x: Tensor, grad: Tensor) -> Tensor:
    if name == "linear":
        return grad
    if name == "relu":
        return grad * (x > 0)
    if name == "tanh":
        return grad * (1 - torch.tanh(x) ** 2)
    if name == "silu":
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))
    density = torch.exp(-0.5 * x * x) * 0.3989422804014327  # gelu: Φ(x) + x·φ(x), 1/√(2π)
    return grad * (0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density)


def _fake(prompt, A, B, beta, W_q, W_k, D, U, G, lowrank_scale, embedding_scale, score_scale, activation="gelu"):
    return torch.empty_like(prompt, memory_format=torch.contiguous_format)


def _backward_fake(
    grad_output, prompt, A, B, beta, W_q, W_k, D, U, G, lowrank_scale, embedding_scale, score_scale, activation="gelu"
):
    parameters = (prompt, A, B, beta, W_q, W_k, D, U, G)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in parameters)


_PARAMETERS = (
    "Tensor prompt, Tensor A, Tensor B, Tensor beta, Tensor W_q, Tensor W_k, Tensor D, Tensor U, Tensor G, "
    'float lowrank_scale, float embedding_scale, float score_scale, str activation="gelu"'
)
joint_prompt = register(
    f"joint_prompt({_PARAMETERS}) -> Tensor", joint_prompt_reference, _fake, launcher="joint_prompt.launchers"
)
joint_prompt_backward = register(
    f"joint_prompt_backward(Tensor grad_output, {_PARAMETERS}) -> ({', '.join(['Tensor'] * 9)})",
    joint_prompt_backward_reference,
    _backward_fake,
    launcher="joint_prompt.launchers",
)
