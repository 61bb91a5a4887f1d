"""The frozen model's element-wise work against what transformers' own modules compute, values and input gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma import modeling_gemma
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.t5 import modeling_t5

from ept import functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = {
    "llama": modeling_llama.LlamaRMSNorm,
    "gemma": modeling_gemma.GemmaRMSNorm,
    "olmo": modeling_olmo2.Olmo2RMSNorm,
    "t5": modeling_t5.T5LayerNorm,
}
ROTARIES = {"llama": (modeling_llama, 8), "gpt_neox": (modeling_gpt_neox, 4), "cohere": (modeling_cohere, 8)}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # ours: transformers'
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_alike(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
    """Compares results and the gradients of their weighted sum: in float64 closely, else by rounding."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [normal(*x.shape, dtype=x.dtype, seed=7 + i) for i, x in enumerate(outputs)]
        loss = sum((x * w).sum(dtype=torch.float64) for x, w in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        # Theirs rounds after every one of up to six steps; in float64 transformers' norms compute in float32.
        unit = torch.finfo(torch.float32 if a.dtype == torch.float64 else a.dtype).eps
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).abs().max() <= 6 * unit * b.double().abs().max()


@by_dtype
@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm(form, dtype, has_residual):
    norm = NORMS[form](48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.add_(normal(48, dtype=dtype) / 4)
    inputs = [normal(2, 3, 48, dtype=dtype, seed=seed) for seed in range(1 + has_residual)]

    def theirs(x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = x if residual is None else residual + x
        return norm(h), h * 1

    def ours(x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        out, h = functional.rms_norm(x, norm.weight, residual, 1e-5, form)
        return out, h * 1

    assert_alike(ours, theirs, inputs)
    assert_alike(lambda *x: ours(*x)[0], lambda *x: theirs(*x)[0], inputs)
    assert_alike(lambda *x: ours(*x)[1], lambda *x: theirs(*x)[1], inputs)


@by_dtype
@pytest.mark.parametrize("model", ROTARIES)
def test_rotary(model, dtype):
    module, columns = ROTARIES[model]
    q, k = (normal(2, 5, heads, 8, dtype=dtype, seed=heads).transpose(1, 2) for heads in (4, 2))
    angles = normal(2, 5, columns // 2, dtype=dtype)
    angles = angles.repeat_interleave(2, -1) if model == "cohere" else angles.repeat(1, 1, 2)
    assert_alike(
        lambda q, k: functional.rotary(q, k, angles.cos(), angles.sin(), interleaved=model == "cohere"),
        lambda q, k: module.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()),
        [q, k],
    )


@by_dtype
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation(name, dtype):
    inputs = [2 * normal(3, 50, dtype=dtype, seed=seed) for seed in (0, 1)]
    activation = ACT2FN[ACTIVATIONS[name]]
    assert_alike(lambda g, u: functional.gated_activation(g, u, name), lambda g, u: activation(g) * u, inputs)


@by_dtype
def test_relu(dtype):
    assert_alike(functional.relu, torch.relu, [normal(3, 51, dtype=dtype)])


def test_little_is_kept_for_the_backward():
    """Per element only tensors that the model holds anyway: the inputs, which are also those of other modules."""
    x, gate = (torch.randn(4, 64, requires_grad=True) for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.rms_norm(x, torch.ones(64))[0].sum()
        functional.gated_activation(gate, x, "silu")
        functional.relu(x)
    held = {x.data_ptr(), gate.data_ptr()}
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in held) == 64 * 4 + 4 * 4 + 4 * 64 // 8


def test_a_weight_that_wants_a_gradient_is_refused():
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(ValueError, match="requires_grad=False"):
        functional.rms_norm(torch.ones(2, 8), weight)
    with torch.no_grad():
        functional.rms_norm(torch.ones(2, 8), weight)


def test_a_name_that_stands_for_nothing_is_refused():
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="activation is 'swish', expected one of silu, gelu, gelu_tanh, relu"):
        functional.gated_activation(x, x, "swish")
    with pytest.raises(ValueError, match="form is 'phi', expected one of llama"):
        functional.rms_norm(x, torch.ones(8), form="phi")
    prompt, A, B, beta = x, torch.ones(2, 2), x, torch.ones(1)
    maps = (torch.ones(8, 3), torch.ones(8, 3), torch.ones(8, 3), torch.ones(3, 8), torch.ones(8, 1))
    with pytest.raises(ValueError, match="activation is 'swish', expected one of gelu"):
        functional.joint_prompt(
            prompt, A, B, beta, *maps, lowrank_scale=1.0, embedding_scale=1.0, score_scale=1.0, activation="swish"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_sum_with_a_residual_of_another_dtype_is_rounded_to_that_of_the_rows(dtype):
    """The fake says so, for compiled models."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    x, weight, residual = normal(3, 8, dtype=dtype), normal(8, dtype=dtype), normal(3, 8, dtype=other, seed=1)
    checked = torch.library.opcheck(torch.ops.ept.rms_norm.default, (x, weight, residual))
    assert set(checked.values()) == {"SUCCESS"}, checked
    assert torch.equal(torch.ops.ept.rms_norm(x, weight, residual)[1], (x + residual).to(dtype))
