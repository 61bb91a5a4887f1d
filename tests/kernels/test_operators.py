"""Operators and layer against the method's formulas written out, against float64, and against PyTorch's own checks."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from layer_checks import (
    MIXED,
    PLAIN,
    TRANSPOSED,
    WRONG_SHAPES,
    check_transposed,
    made_wrong,
    make_ids,
    make_layer,
    step,
)
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ept_kernels
from ept import functional
from ept_kernels.dev.problems import JointPrompt, PackedEmbedding, PromptedEmbedding, TokenUpdate, opcheck_problems
from ept_kernels.joint_prompt.reference import ACTIVATIONS, NORM_EPS
from ept_kernels.problem import as_tuple, in_float64, strided

F64 = torch.float64


def joint(s: int = 3, d: int = 12, r: int = 2, **changes) -> JointPrompt:
    return JointPrompt(s, d, r=r, **{"dtype": F64, "K": 3, **changes})


JOINT = [
    *(joint(activation=name) for name in ACTIVATIONS),
    *(joint(activation=name, a=4) for name in ("gelu", "silu")),
    joint(r=0),
    joint(s=0),
    joint(s=1, m=1, r=1),
    joint(K=1),
    joint(K=0),
    joint(fusion=False),
    joint(fusion=False, K=0, r=0),
    joint(s=40, d=100, m=63, r=30, a=5),
]


def joint_prompt(*arguments):
    options = dict(zip(("lowrank_scale", "embedding_scale", "score_scale", "activation"), arguments[9:], strict=True))
    return functional.joint_prompt(*arguments[:9], **options)


def formula(p, A, B, beta, W_q, W_k, D, U, G, lowrank_scale, embedding_scale, score_scale, activation):
    """DESIGN's table of steps, literally: C is built, every space has its own map."""

    def normalise(x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + NORM_EPS)

    C = lowrank_scale * (A @ B)
    X = torch.cat([C, p]) if A.shape[1] else p
    total = p
    if beta.numel():
        q, k = normalise(p), normalise(X)
        if W_q.shape[1]:
            q, k = q @ W_q, k @ W_k
        total = total + beta * (torch.softmax(score_scale * (q @ k.T), dim=1) @ X)
    phi = {"tanh": torch.tanh, "linear": lambda x: x}.get(activation) or getattr(F, activation)
    gate = torch.softmax(normalise(p) @ G, dim=1) if G.shape[1] else p.new_ones(len(p), 1)
    width = D.shape[1] // gate.shape[1]
    for space in range(gate.shape[1]):
        columns = slice(space * width, (space + 1) * width)
        total = total + gate[:, space : space + 1] * (phi(normalise(p) @ D[:, columns]) @ U[columns])
    return embedding_scale * total


def assert_is_the_formula(actual, expected, inputs):
    """The value, and the gradients by `inputs` of a weighted sum."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    of_formula = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for a, e, x in zip(gradients, of_formula, inputs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if e is None else e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("problem", JOINT, ids=lambda p: p.name)
def test_joint_prompt_and_its_gradients_are_those_of_the_formula(problem):
    inputs, options = [x.requires_grad_() for x in problem.parameters()], problem.options()
    assert_is_the_formula(joint_prompt(*inputs, *options), formula(*inputs, *options), inputs)


@pytest.mark.parametrize(
    "options, score_scale", [({"fusion_dim": 4}, 1 / 2), ({"fusion_dim": 0}, 1 / 8), ({"fusion_score_scale": 0.3}, 0.3)]
)
def test_the_layers_joint_prompt_is_the_formula_at_its_scales(options, score_scale):
    """c = α/√r with α = 8, and σ = 1/√a: of the maps' dimensions, or of the 64 of the embeddings."""
    layer = make_layer(r=4, **options)
    parts = [layer.part(name).double() for name in ("prompt", "A", "B", "beta", "W_q", "W_k", "D", "U", "G")]
    expected = formula(*parts, 4.0, layer.embedding_scale, score_scale, "gelu")
    torch.testing.assert_close(layer.joint_prompt().double(), expected, rtol=1e-5, atol=1e-5)


def test_joint_prompt_gradient_is_finite_where_the_update_is_zero():
    """B = 0 at the start: with ε outside the root of the normalisation the first gradient would be NaN."""
    problem = joint(dtype=torch.float32)
    inputs = problem.parameters()
    inputs[2].zero_()
    inputs = [x.requires_grad_() for x in inputs]
    joint_prompt(*inputs, *problem.options()).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_joint_prompt_and_its_gradients_are_finite_where_rows_of_the_update_cancel():
    """The squares of C's rows, `A·(B·Bᵀ)·Aᵀ`, are rounded to negative numbers here."""
    problem = joint(s=4, d=100, m=16, r=3, dtype=torch.float32)
    prompt, A, B, *others = problem.parameters()
    A, B[2] = 100 * A[:, :1].abs() * torch.tensor([1, 1, -1]), B[0] + B[1]  # A·B = 0
    inputs = [x.requires_grad_() for x in (prompt, A, B, *others)]
    out = joint_prompt(*inputs, *problem.options())
    out.sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, *(x.grad for x in inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joint_prompt_accumulates_in_float32_and_rounds_once(dtype):
    """Both ways; the gradient that comes in may be of another type than the parameters."""
    inputs = joint(s=40, d=100, m=63, r=30, dtype=dtype).inputs()
    exact = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in in_float64(inputs)]
    expected = formula(*exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, exact[:9], grad.double(), allow_unused=True)
    results = [joint_prompt(*inputs), *ept_kernels.joint_prompt_backward(grad, *inputs)]
    for actual, e in zip(results, (expected, *gradients), strict=True):
        assert actual.dtype == dtype
        if e is not None and e.numel():
            rounding = torch.finfo(dtype).eps / 2 * e.abs()
            assert ((actual.double() - e).abs() <= rounding + 1e-5 * e.abs().max()).all()


def embedding(n: int = 5, d: int = 8, s: int = 2, r: int = 2, dtype: torch.dtype = F64, **changes) -> PromptedEmbedding:
    return PromptedEmbedding(n, d, s, r=r, dtype=dtype, parameters=dtype, **{"m": 6, **changes})


EMBEDDINGS = {
    "plain": embedding(),
    "padding on the left": embedding(padding="left"),
    "no prompt": embedding(s=0),
    "no update": embedding(r=0),
    "no text": embedding(n=0),
    "nothing": embedding(s=0, r=0),
    "text of the longest length": embedding(n=6),
    "mixed adapters": embedding(adapters=2),
    "mixed prompts": embedding(adapters=2, r=0),
}


def embedding_formula(ids, positions, table, prompt, A, B, scale, adapter_ids):
    """Row by row, token by token."""
    rows = []
    for b in range(ids.shape[0]):
        p, C, updated = prompt, scale * A @ B, True
        if adapter_ids is not None:
            updated = adapter_ids[b] >= 0  # where not, the caller masks the prompt, which gets no gradient
            p, C = prompt[adapter_ids[b]], C[adapter_ids[b]]
            p = p if updated else p.detach()
        tokens = [table[i] + (C[at] if updated and at >= 0 else 0) for i, at in zip(ids[b], positions[b], strict=True)]
        rows.append(torch.stack([*p, *tokens]) if tokens or prompt.shape[-2] else table[:0])
    return torch.stack(rows)


@pytest.mark.parametrize("problem", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_prompted_embedding_and_its_gradients_are_those_of_the_formula(problem):
    ids, positions, table, prompt, A, B, scale, adapter_ids = problem.inputs()
    leaves = [x.requires_grad_() for x in (table, prompt, A, B)]
    arguments = (ids, positions, *leaves, scale, adapter_ids)
    assert_is_the_formula(functional.prompted_embedding(*arguments), embedding_formula(*arguments), leaves)


def by_token_formula(ids, positions, table, prompt, W_in, b_in, W_out, b_out, scale):
    """Token by token."""
    rows = []
    for text, at in zip(ids, positions, strict=True):
        tokens = list(prompt)
        for i, position in zip(text, at, strict=True):
            hidden = (table[i] / scale @ W_in + b_in).clamp(min=0)
            tokens.append(table[i] + (scale * (hidden @ W_out + b_out) if position >= 0 else 0))
        rows.append(torch.stack(tokens) if tokens else table[:0])
    return torch.stack(rows)


BY_TOKEN = TokenUpdate(n=5, d=8, s=2, r=2, dtype=F64, parameters=F64)


@pytest.mark.parametrize("change", [{}, {"padding": "left"}, {"s": 0}, {"n": 0}, {"r": 5}], ids=str)
def test_an_update_by_the_token_and_its_gradients_are_those_of_the_formula(change):
    ids, positions, *floating, scale = replace(BY_TOKEN, **change).inputs()
    leaves = [x.requires_grad_() for x in floating]
    output = functional.prompted_embedding_by_token(ids, positions, *leaves, scale=scale)
    assert_is_the_formula(output, by_token_formula(ids, positions, *leaves, scale), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_by_the_token_rounds_once_to_the_tables_dtype(dtype):
    problem = replace(BY_TOKEN, d=100, r=30, dtype=dtype, parameters=torch.float32)
    *tensors, scale = problem.inputs()
    output = functional.prompted_embedding_by_token(*tensors, scale=scale)
    exact = by_token_formula(*in_float64(problem.inputs()))
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_a_token_without_an_update_keeps_its_bits_and_gives_no_gradient_whatever_the_bottleneck_holds():
    ids, positions, table, prompt, *parts, scale = replace(BY_TOKEN, padding="left").inputs()
    assert (positions < 0).any()
    poisoned = [torch.full_like(part, float("nan")) for part in parts]
    leaves = [x.requires_grad_() for x in (table, prompt)]
    no_update = torch.full_like(positions, -1)
    out = functional.prompted_embedding_by_token(ids, no_update, *leaves, *poisoned, scale=scale)
    assert torch.equal(out[:, 2:], table[ids])
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(table[ids], table, grad[:, 2:])
    assert all(map(torch.equal, torch.autograd.grad(out, table, grad), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompted_embedding_rounds_once_to_the_tables_dtype(dtype):
    inputs = PromptedEmbedding(5, d=100, s=2, r=30, m=6, dtype=dtype).inputs()
    output = functional.prompted_embedding(*inputs)
    exact = embedding_formula(*in_float64(inputs))
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


SIXTEEN_BITS = [PromptedEmbedding(n=5, d=100, s=2, r=30, m=6), TokenUpdate(n=5, d=100, s=2, r=30)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("problem", SIXTEEN_BITS, ids=lambda p: p.operator)
def test_gradients_and_activations_beside_a_table_of_16_bits_are_summed_in_float32(problem, dtype):
    problem = replace(problem, dtype=dtype)
    for checked in (problem, problem.backward):
        inputs = checked.inputs()
        results = as_tuple(getattr(ept_kernels, checked.operator)(*inputs))
        for actual, exact in zip(results, checked.expected(*inputs), strict=True):
            if checked is problem and actual is results[0]:
                continue  # the output, which is rounded
            assert actual.dtype == torch.float32
            assert (actual.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("update", ["position", "token"])
def test_no_gradient_of_a_frozen_table_is_computed_and_the_backward_is_repeatable(update, monkeypatch):
    computed = []
    of_table = functional._grad_of_table
    monkeypatch.setattr(functional, "_grad_of_table", lambda *x: computed.append(1) or of_table(*x))
    layer, (ids, mask) = make_layer(update=update), make_ids()
    one, again = step(layer, ids, mask), step(layer, ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not computed
    layer._embedding[0].requires_grad_()
    step(layer, ids, mask)
    assert computed


@pytest.mark.parametrize("change", [{}, {"n": 0}, {"r": 0}], ids=["update", "no text", "no update"])
def test_gradients_have_the_dtype_of_A(change):
    grad, positions, A, B, *rest = embedding(dtype=torch.float32, **change).backward.inputs()
    gradients = ept_kernels.prompted_embedding_backward(grad, positions, A, B.bfloat16(), *rest)
    assert {x.dtype for x in gradients} == {torch.float32}


def test_packed_batch_equals_the_padded_one():
    _, _, table, prompt, A, B, scale, _ = embedding().inputs()
    texts = [torch.tensor([4, 5, 6]), torch.tensor([7]), torch.tensor([1, 2, 3, 8, 9])]
    packed = ept_kernels.prompted_embedding_packed(
        torch.cat(texts), torch.tensor([0, 3, 4, 9], dtype=torch.int32), table, prompt, A, B, scale
    )
    expected = [
        ept_kernels.prompted_embedding(t[None], torch.arange(len(t))[None], table, prompt, A, B, scale)[0]
        for t in texts
    ]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    "problem, index, left, name", WRONG_SHAPES, ids=[f"{p.operator} {name}" for p, _, _, name in WRONG_SHAPES]
)
def test_a_shape_that_does_not_fit_is_refused_and_named(problem, index, left, name):
    """A reference would repeat a row of one column, or one text's positions, for all."""
    operator, inputs = getattr(torch.ops.ept, problem.operator), problem.inputs()
    operator(*inputs)
    with pytest.raises(ValueError, match=rf"^{name} has shape \[.*\], but the other arguments require"):
        operator(*made_wrong(inputs, index, left))


@pytest.mark.parametrize("problem", [PLAIN, MIXED], ids=["none", "two"])
def test_adapters_and_their_ids_come_together(problem):
    inputs = list(problem.inputs())
    inputs[-1] = None if problem.adapters else torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^prompt has shape"):
        torch.ops.ept.prompted_embedding(*inputs)


@pytest.mark.parametrize("ends", [[1, 9], [0, 8], [0, 5, 3, 9], [0, 10], []])
def test_packed_texts_cover_the_tokens(ends):
    ids, _, *rest = PackedEmbedding((4, 5)).inputs()
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 9, got"):
        ept_kernels.prompted_embedding_packed(ids, torch.tensor(ends, dtype=torch.int32), *rest)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_ids_of_another_type_are_no_mask(dtype):
    ids, *rest = PLAIN.inputs()
    with pytest.raises(RuntimeError, match="Long, Int; but got"):
        ept_kernels.prompted_embedding(ids.to(dtype), *rest)


def test_inputs_may_be_non_contiguous():
    *tensors, scale, _ = embedding().inputs()
    gaps = [strided(x) for x in tensors]
    assert not any(x.is_contiguous() for x in gaps)
    expected = functional.prompted_embedding(*tensors, scale)
    torch.testing.assert_close(functional.prompted_embedding(*gaps, scale), expected, rtol=0, atol=0)


def test_autocast_does_not_reach_into_the_operators():
    inputs = joint(s=40, d=100, m=63, r=30, dtype=torch.float32).inputs()
    expected = joint_prompt(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = joint_prompt(*inputs)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", [partial(FlopCounterMode, display=False), torch.inference_mode])
def test_the_backward_works_where_autograd_is_shut_out(mode):
    """The reference makes use of it."""
    problem = joint(dtype=torch.float32).backward
    inputs = problem.inputs()
    expected = ept_kernels.joint_prompt_backward(*inputs)
    with mode():
        counted = ept_kernels.joint_prompt_backward(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(counted, expected, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"fusion_dim": 0}, {"num_spaces": 1}, {"fusion": False}, {"r": 0}],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "all parts",
)
def test_the_layers_gradients_pass_gradcheck(options):
    """All parameters' against finite differences, in float64."""
    layer, (ids, mask) = make_layer(**options).double(), make_ids()
    names, values = zip(*layer.named_parameters(), strict=True)
    named = {"embedding": layer._embedding[0].double()}

    def output(*parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (ids, mask), named)[0]

    assert output(*values).requires_grad
    assert torch.autograd.gradcheck(output, tuple(x.detach().requires_grad_() for x in values), fast_mode=True)


@pytest.mark.parametrize("loss", [torch.sum, lambda output: output.square().sum()], ids=["linear", "square"])
def test_second_derivatives_are_refused(loss):
    """Even if the incoming gradient needs none, and with `torch.autograd.grad`, which skips what it can."""
    inputs, options = [x.requires_grad_() for x in joint().parameters()], joint().options()
    with pytest.raises(NotImplementedError, match="no second derivatives, which create_graph=True asks for"):
        torch.autograd.grad(loss(joint_prompt(*inputs, *options)), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.functional.hessian(lambda x: loss(joint_prompt(x, *inputs[1:], *options)), inputs[0])


@pytest.mark.parametrize("problem", opcheck_problems(), ids=lambda p: p.name)
def test_operators_pass_opcheck_and_are_within_their_problems_tolerance(problem):
    operator = getattr(torch.ops.ept, problem.operator).default
    checked = torch.library.opcheck(operator, problem.inputs())
    assert set(checked.values()) == {"SUCCESS"}, checked
    inputs = problem.inputs(seed=3)
    results, expected = as_tuple(operator(*inputs)), problem.expected(*inputs)
    for actual, exact, allowed in zip(
        results, expected, problem.errors_allowed(results, expected, inputs), strict=True
    ):
        assert actual.shape == exact.shape
        assert (actual.double() - exact).abs().le(allowed).all()


@pytest.mark.parametrize("problem", opcheck_problems(), ids=lambda p: p.name)
def test_bare_operators_refuse_what_requires_gradients(problem):
    """A kernel would silently give none, a reference possibly right ones."""
    operator, inputs = getattr(torch.ops.ept, problem.operator).default, problem.inputs()
    floating = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in floating:
        x.requires_grad_()
        with pytest.raises(RuntimeError, match=rf"^ept::{problem.operator} has no gradients of its own"):
            operator(*inputs)
        with torch.no_grad():
            operator(*inputs)
        x.requires_grad_(False)
    operator(*inputs)
    assert floating or problem.operator == "token_at"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_cut_off_to_tf32_are_within_the_tolerance_of_16_bits_though_the_sum_cancels(dtype):
    problem = PromptedEmbedding(n=4, d=8, s=0, r=16, m=4, batch=1, padding="none", dtype=dtype, scale=1.0)
    ids, positions, table, prompt, A, B, scale, _ = problem.inputs()
    A[:], B[:] = 1 + 2**-10 - 2**-20, -1 - 2**-10 + 2**-20  # of which TF32 keeps 1
    table[:] = 16.0
    arguments = (ids, positions, table, prompt, A, B, scale, None)
    expected = problem.expected(*arguments)
    cut = [torch.full_like(x, float(x.flatten()[0].sign())) for x in (A, B)]
    actual = (ept_kernels.prompted_embedding_reference(ids, positions, table, prompt, *cut, scale),)
    error = float((actual[0].double() - expected[0]).abs().max())
    assert error > problem.tolerance(dtype) * float(expected[0].abs().max())
    assert (error <= problem.errors_allowed(actual, expected, arguments)[0]) == (dtype != torch.float32)


def test_every_operator_is_opchecked():
    checked = {problem.operator for problem in opcheck_problems()}
    assert checked >= {name for name in ept_kernels.__all__ if hasattr(torch.ops.ept, name)}


def test_the_card_lists_every_operator_with_the_arguments_of_its_schema():
    card = (Path(__file__).parents[2] / "kernels" / "CARD.md").read_text(encoding="utf-8")
    operators = {name: getattr(torch.ops.ept, name) for name in ept_kernels.__all__ if hasattr(torch.ops.ept, name)}
    of_weight = set(re.findall(r"\w+", " ".join(re.findall(r"`(packed[^`]*|quant_type[^`]*)`", card))))
    for name, operator in operators.items():
        (listed,) = re.findall(rf"^\| `{name}` \| `([^`]*)` \| \S", card, re.MULTILINE)
        arguments = set(listed.split(", "))
        if "4bit" in name and "weight" in arguments:
            arguments = arguments - {"weight"} | of_weight
        assert arguments == {argument.name for argument in operator.default._schema.arguments}, name
    assert len(operators) == card.count("\n| `")


@pytest.mark.parametrize("problem", TRANSPOSED, ids=lambda problem: problem.operator)
def test_transposed_parameters_pass_opcheck(problem):
    check_transposed(problem, "cpu")
