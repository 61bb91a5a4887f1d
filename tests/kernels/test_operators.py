"""The operators against the method's formulas written out, against float64, and against PyTorch's own checks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import ept_kernels
from ept import functional
from ept_kernels.joint_prompt.reference import ACTIVATIONS, NORM_EPS


@dataclass(frozen=True)
class Joint:
    """Sizes of a joint prompt; 0 switches a part off."""

    s: int = 3
    d: int = 12
    m: int = 7
    r: int = 2
    spaces: int = 3
    width: int = 2
    maps: int = 0
    fusion: bool = True
    activation: str = "gelu"

    @property
    def id(self) -> str:
        return (
            ",".join(f"{k}={v}" for k, v in vars(self).items() if v != Joint.__dataclass_fields__[k].default)
            or "all parts"
        )

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        columns = self.spaces * self.width
        gates = self.spaces if self.spaces > 1 else 0
        shapes = [
            (self.s, self.d),
            (self.m, self.r),
            (self.r, self.d),
            (int(self.fusion),),
            (self.d, self.maps),
            (self.d, self.maps),
            (self.d, columns),
            (columns, self.d),
            (self.d, gates),
        ]
        return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


OPTIONS = {"lowrank_scale": 1.3, "embedding_scale": 0.7, "score_scale": 0.5}
PROBLEMS = [
    *(Joint(activation=name) for name in ACTIVATIONS),
    *(Joint(activation=name, maps=4) for name in ("gelu", "silu")),
    Joint(r=0),
    Joint(s=0),
    Joint(s=1, m=1, r=1),
    Joint(spaces=1),
    Joint(spaces=0),
    Joint(fusion=False),
    Joint(fusion=False, spaces=0, r=0),
    Joint(s=40, d=100, m=63, r=30, maps=5),
]


def formula(problem: Joint, p, A, B, beta, W_q, W_k, D, U, G):
    """DESIGN's table of steps, literally: C is built, every space has its own map."""

    def normalise(x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + NORM_EPS)

    C = OPTIONS["lowrank_scale"] * (A @ B)
    X = torch.cat([C, p]) if problem.r else p
    joint = p
    if problem.fusion:
        q, k = normalise(p), normalise(X)
        if problem.maps:
            q, k = q @ W_q, k @ W_k
        joint = joint + beta * (torch.softmax(OPTIONS["score_scale"] * (q @ k.T), dim=1) @ X)
    phi = {"tanh": torch.tanh, "linear": lambda x: x}.get(problem.activation) or getattr(F, problem.activation)
    gate = torch.softmax(normalise(p) @ G, dim=1) if problem.spaces > 1 else p.new_ones(problem.s, 1)
    for space in range(problem.spaces):
        columns = slice(space * problem.width, (space + 1) * problem.width)
        joint = joint + gate[:, space : space + 1] * (phi(normalise(p) @ D[:, columns]) @ U[columns])
    return OPTIONS["embedding_scale"] * joint


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_joint_prompt_is_the_formula(problem):
    inputs = problem.inputs()
    expected = formula(problem, *inputs)
    actual = functional.joint_prompt(*inputs, **OPTIONS, activation=problem.activation)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_joint_prompt_gradients_are_those_of_the_formula(problem):
    inputs = [x.requires_grad_() for x in problem.inputs()]
    weight = torch.randn(problem.s, problem.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((formula(problem, *inputs) * weight).sum(), inputs, allow_unused=True)
    output = functional.joint_prompt(*inputs, **OPTIONS, activation=problem.activation)
    actual = torch.autograd.grad((output * weight).sum(), inputs)
    for a, e, x in zip(actual, expected, inputs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if e is None else e, rtol=1e-10, atol=1e-10)


def test_joint_prompt_gradient_is_finite_where_the_update_is_zero():
    """B = 0 at the start: with ε outside the root of the normalisation the first gradient would be NaN."""
    inputs = Joint().inputs(torch.float32)
    inputs[2].zero_()
    inputs = [x.requires_grad_() for x in inputs]
    functional.joint_prompt(*inputs, **OPTIONS, activation="gelu").sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_joint_prompt_accumulates_in_float32(dtype, tolerance):
    problem = Joint(s=40, d=100, m=63, r=30)
    inputs = problem.inputs(dtype)
    exact = formula(problem, *(x.double() for x in inputs))
    actual = functional.joint_prompt(*inputs, **OPTIONS, activation="gelu")
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= 2 * tolerance * exact.abs().max()


@dataclass(frozen=True)
class Embedding:
    batch: int = 3
    n: int = 5
    s: int = 2
    d: int = 8
    m: int = 6
    r: int = 2
    adapters: int = 0
    id: str = "plain"

    def inputs(self, dtype: torch.dtype = torch.float64):
        g = torch.Generator().manual_seed(0)

        def normal(*shape):
            lead = (self.adapters,) if self.adapters else ()
            return torch.randn((*lead, *shape), dtype=torch.float64, generator=g).to(dtype)

        table = torch.randn((11, self.d), dtype=torch.float64, generator=g).to(dtype)
        ids = torch.randint(0, 11, (self.batch, self.n), generator=g)
        positions = torch.arange(self.n).repeat(self.batch, 1)
        if self.n:
            positions[0, -1] = -1  # right padding
            positions[1] = torch.cat([torch.tensor([-1]), torch.arange(self.n - 1)])  # left padding
        adapter_ids = torch.tensor([1, 0, 1][: self.batch]) if self.adapters else None
        return (
            ids,
            positions,
            table,
            normal(self.s, self.d),
            normal(self.m, self.r),
            normal(self.r, self.d),
            1.7,
            adapter_ids,
        )


EMBEDDINGS = [
    Embedding(),
    Embedding(s=0, id="no prompt"),
    Embedding(r=0, id="no update"),
    Embedding(n=0, id="no text"),
    Embedding(s=0, r=0, id="nothing"),
    Embedding(n=6, id="text of the longest length"),
    Embedding(adapters=2, id="mixed adapters"),
    Embedding(adapters=2, r=0, id="mixed prompts"),
]


def embedding_formula(ids, positions, table, prompt, A, B, scale, adapter_ids):
    """Row by row, token by token."""
    rows = []
    for b in range(ids.shape[0]):
        choose = (lambda x: x) if adapter_ids is None else (lambda x, b=b: x[adapter_ids[b]])
        C = scale * choose(A) @ choose(B)
        tokens = [table[i] + (C[p] if p >= 0 else 0) for i, p in zip(ids[b], positions[b], strict=True)]
        rows.append(torch.stack([*choose(prompt), *tokens]) if tokens or prompt.shape[-2] else table[:0])
    return torch.stack(rows)


@pytest.mark.parametrize("problem", EMBEDDINGS, ids=lambda p: p.id)
def test_prompted_embedding_is_the_formula(problem):
    inputs = problem.inputs()
    torch.testing.assert_close(
        functional.prompted_embedding(*inputs), embedding_formula(*inputs), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("problem", EMBEDDINGS, ids=lambda p: p.id)
def test_prompted_embedding_gradients_are_those_of_the_formula(problem):
    ids, positions, table, prompt, A, B, scale, adapter_ids = problem.inputs()
    leaves = [x.requires_grad_() for x in (table, prompt, A, B)]
    expected_output = embedding_formula(ids, positions, *leaves, scale, adapter_ids)
    weight = torch.randn(expected_output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((expected_output * weight).sum(), leaves, allow_unused=True)
    output = functional.prompted_embedding(ids, positions, *leaves, scale, adapter_ids)
    actual = torch.autograd.grad((output * weight).sum(), leaves)
    for a, e, x in zip(actual, expected, leaves, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if e is None else e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompted_embedding_rounds_once_to_the_tables_dtype(dtype):
    ids, positions, table, *rest = Embedding(d=100, r=30, m=6).inputs(torch.float32)
    table = table.to(dtype)
    output = functional.prompted_embedding(ids, positions, table, *rest)
    exact = embedding_formula(ids, positions, table.double(), *(x.double() if torch.is_tensor(x) else x for x in rest))
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_frozen_table_gets_no_gradient_and_the_backward_is_repeatable():
    ids, positions, table, prompt, A, B, scale, _ = Embedding(batch=3, n=6, d=64).inputs(torch.float32)
    gradients = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (prompt, A, B)]
        functional.prompted_embedding(ids, positions, table, *leaves, scale).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert table.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_packed_batch_equals_the_padded_one():
    _, _, table, prompt, A, B, scale, _ = Embedding().inputs()
    texts = [torch.tensor([4, 5, 6]), torch.tensor([7]), torch.tensor([1, 2, 3, 8, 9])]
    packed = ept_kernels.prompted_embedding_packed(
        torch.cat(texts), torch.tensor([0, 3, 4, 9], dtype=torch.int32), table, prompt, A, B, scale
    )
    expected = [
        ept_kernels.prompted_embedding(t[None], torch.arange(len(t))[None], table, prompt, A, B, scale)[0]
        for t in texts
    ]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=0)


def test_inputs_may_be_non_contiguous():
    ids, positions, table, prompt, A, B, scale, _ = Embedding().inputs()
    expected = functional.prompted_embedding(ids, positions, table, prompt, A, B, scale)
    strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (ids, positions, table, prompt, A, B)]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(functional.prompted_embedding(*strided, scale), expected, rtol=0, atol=0)


def test_autocast_does_not_reach_into_the_operators():
    problem = Joint(s=40, d=100, m=63, r=30)
    inputs = problem.inputs(torch.float32)
    expected = functional.joint_prompt(*inputs, **OPTIONS, activation="gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = functional.joint_prompt(*inputs, **OPTIONS, activation="gelu")
    assert torch.equal(actual, expected)


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in Joint().inputs()]
    (gradient,) = torch.autograd.grad(
        functional.joint_prompt(*inputs, **OPTIONS, activation="gelu").square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _opcheck_cases():
    joint = Joint().inputs(torch.float32)
    options = (1.3, 0.7, 0.5, "gelu")
    ids, positions, table, prompt, A, B, scale, _ = Embedding().inputs(torch.float32)
    mixed = Embedding(adapters=2).inputs(torch.float32)
    cu_seqlens = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    grad = torch.randn(3, 7, 8)
    return {
        "joint_prompt": (*joint, *options),
        "joint_prompt_backward": (joint[0], *joint, *options),
        "prompted_embedding": (ids, positions, table, prompt, A, B, scale),
        "prompted_embedding mixed": mixed,
        "prompted_embedding_packed": (ids.flatten(), cu_seqlens, table, prompt, A, B, scale),
        "prompted_embedding_backward": (grad, positions, A, B, scale),
        "prompted_embedding_backward mixed": (grad, positions, mixed[4], mixed[5], scale, mixed[7]),
    }


@pytest.mark.parametrize("name", list(_opcheck_cases()))
def test_opcheck(name):
    operator = getattr(ept_kernels, name.split()[0])
    results = torch.library.opcheck(operator, _opcheck_cases()[name])
    assert set(results.values()) == {"SUCCESS"}, results
