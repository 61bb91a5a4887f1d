"""The Triton kernels of the joint prompt and its backward against their references in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, LARGE, configured, rounding
from torch import Tensor

import ept_kernels
from ept_kernels import launch
from ept_kernels.dev.problems import JointPrompt
from ept_kernels.joint_prompt import launchers as kernels
from ept_kernels.joint_prompt.reference import ACTIVATIONS
from ept_kernels.problem import as_tuple, in_float64

NAMES = ("prompt", "A", "B", "beta", "W_q", "W_k", "D", "U", "G")
FLOAT32_TOLERANCE = 1e-5  # of the largest magnitude of a result, or of what it is the sum of

SMALL = [
    *(JointPrompt(activation=name) for name in ACTIVATIONS),
    # narrow, odd
    JointPrompt(s=40, d=33, m=63, r=30),
    # parts that are off
    JointPrompt(s=0),
    JointPrompt(r=0),
    JointPrompt(r=0, a=3),
    JointPrompt(m=0),
    JointPrompt(K=0),
    JointPrompt(K=0, r=0),
    JointPrompt(K=1, h=3),
    JointPrompt(K=8, h=1, fusion=False),
    JointPrompt(K=20, h=1, fusion=False, r=0),
    JointPrompt(K=0, fusion=False),
    JointPrompt(h=0, fusion=False),  # a gate without spaces
    # maps
    JointPrompt(a=4, K=0),
    JointPrompt(a=5, fusion=False),
    # types, layouts, sizes of the entries
    JointPrompt(dtype=torch.bfloat16, a=4),
    JointPrompt(dtype=torch.float16, s=17, m=40),
    JointPrompt(strided=True, a=4),
    JointPrompt(strided=True, dtype=torch.bfloat16),
    JointPrompt(scale=1e-3, activation="tanh"),
]
# Run in the blocks of `LARGE`: wider and longer than a tile, several tiles of everything.
WIDE = [
    JointPrompt(s=40, d=100, m=63, r=30, h=4),
    JointPrompt(s=40, d=768, m=256, r=30),
    JointPrompt(s=100, d=1000, m=256, r=64, K=8, h=4),
    JointPrompt(s=100, d=4096, m=63, r=30, K=8, h=3, a=20),
    JointPrompt(s=1, d=4096, m=1, r=1, K=1, h=1),
    JointPrompt(s=1, d=20, m=256, r=64),
    JointPrompt(s=33, d=33, m=65, r=17, K=3, h=11),
    JointPrompt(s=2, d=40, m=5, r=70, a=33),
    JointPrompt(s=40, d=100, m=63, r=30, a=16, activation="silu"),
    JointPrompt(scale=20.0, s=40, m=63),
    JointPrompt(K=4, h=64),
    JointPrompt(K=40, h=2),
]
PROBLEMS = [*SMALL, *WIDE]
by_name = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
pytestmark = pytest.mark.usefixtures("poisoned")


def run(problem: JointPrompt, device: torch.device) -> tuple[Tensor, ...]:
    """Under the interpreter in the blocks of `LARGE` where the problem is among `WIDE`."""
    launcher = getattr(kernels, problem.operator)
    is_wide = INTERPRETED and replace(problem, operator="joint_prompt") in WIDE
    with configured(LARGE if is_wide else {}):
        return as_tuple(launcher(*problem.inputs(device)))


def assert_close(actual: Tensor, exact: Tensor, what: str, summand: Tensor | None = None) -> None:
    """`summand`: a large part of the sum, should it cancel with others."""
    assert actual.shape == exact.shape, what
    if not exact.numel():
        return
    magnitude = max(x.abs().max().item() for x in (exact, summand) if x is not None)
    tolerance = FLOAT32_TOLERANCE * magnitude + torch.finfo(torch.float32).smallest_normal
    error = (actual.double() - exact).abs()
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert (error <= tolerance + rounding(actual, exact)).all(), (
        f"{what}: {error.max()} off, where {magnitude} were added up"
    )


@by_name
def test_forward_equals_the_reference(problem, device):
    (exact,), (actual,) = problem.expected(*problem.inputs(device)), run(problem, device)
    assert actual.dtype == problem.dtype
    rows = problem.options()[1] * problem.parameters(device)[0].double()
    assert_close(actual, exact, "output", rows)


@by_name
def test_backward_equals_the_reference(problem, device):
    problem = problem.backward
    inputs = problem.inputs(device)
    for name, a, e in zip(NAMES, run(problem, device), problem.expected(*inputs), strict=True):
        assert a.dtype == problem.dtype, name
        assert a.is_contiguous(), name
        assert_close(a, e, name, problem.options()[1] * inputs[0].double() if name == "prompt" else None)


def test_results_are_finite_where_rows_of_the_update_cancel(device):
    """The squares of C's rows, `A·(B·Bᵀ)·Aᵀ`, are rounded to negative numbers under the interpreter."""
    problem = JointPrompt(s=4, d=100, m=16)
    prompt, A, B, *others = problem.parameters(device)
    A, B[2] = 100 * A[:, :1].abs() * A.new_tensor([1, 1, -1]), B[0] + B[1]  # A·B = 0
    arguments = (prompt, A, B, *others, *problem.options())
    results = [kernels.joint_prompt(*arguments)]
    results += kernels.joint_prompt_backward(problem.grad_output(device), *arguments)
    assert all(torch.isfinite(result).all() for result in results)


def test_tanh_of_small_numbers_does_not_cancel(device, large_blocks):
    problem = JointPrompt(activation="tanh")
    parameters, grad = problem.parameters(device), problem.grad_output(device)
    parameters[6] *= 1e-3  # D
    exact = ept_kernels.joint_prompt_backward_reference(*in_float64((grad, *parameters)), *problem.options())
    actual = kernels.joint_prompt_backward(grad, *parameters, *problem.options())
    assert_close(actual[7], exact[7], "U")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_diverged_space_is_not_hidden_by_the_activation(activation, device, large_blocks):
    problem = JointPrompt(activation=activation)
    parameters, grad = problem.parameters(device), problem.grad_output(device)
    parameters[6][:, 1] = float("nan")  # of D
    assert kernels.joint_prompt(*parameters, *problem.options()).isnan().all()
    exact = ept_kernels.joint_prompt_backward_reference(grad, *parameters, *problem.options())
    actual = kernels.joint_prompt_backward(grad, *parameters, *problem.options())
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        assert torch.equal(a.isnan(), e.isnan()), name


def test_norms_of_the_update_that_overflow_to_nan_are_not_hidden(device, large_blocks):
    """A row of C has the square `inf - inf`, while its scores are finite."""
    problem = JointPrompt(r=2)
    parameters = problem.parameters(device)
    _, A, B, *_ = parameters
    A[0], B[1] = A.new_tensor([1e20, -1e20]), 3 * B[0]
    assert kernels.joint_prompt(*parameters, *problem.options()).isnan().all()


SMALLEST = {
    "joint_prompt_products": {"BLOCK_K": 16, "PROGRAMS": 100},
    "joint_prompt_expand": {"BLOCK_D": 16},
}
SINGLE_PART = {
    **(LARGE if INTERPRETED else {}),
    "joint_prompt_products": {"BLOCK_K": 64, "PROGRAMS": 1},
    "joint_prompt_expand": {"BLOCK_D": 64},
}


@pytest.mark.parametrize(
    "blocks, problem",
    [
        (SMALLEST, JointPrompt(s=33, d=18, m=33, K=2, h=17)),  # tiles of every kind number more than one
        (SMALLEST, JointPrompt(s=33, d=17, m=33, r=33, K=2, h=1, a=33)),
        (SINGLE_PART, JointPrompt(s=20, d=70, m=40, r=20, K=3, h=7)),
        (SINGLE_PART, JointPrompt(s=20, d=70, m=40, r=20, K=3, h=7, a=20)),
    ],
    ids=["smallest", "smallest, maps", "single part", "single part, maps"],
)
def test_any_launch_configuration_is_right(blocks, problem, device):
    """A tuner may choose any of them."""
    with configured(blocks):
        test_forward_equals_the_reference(problem, device)
        test_backward_equals_the_reference(problem, device)


@pytest.mark.parametrize(
    "problem, launches",
    [
        (JointPrompt(), (4, 5)),
        (JointPrompt(a=4), (4, 5)),
        (JointPrompt(K=0), (4, 5)),
        (JointPrompt(fusion=False), (4, 4)),
        (JointPrompt(fusion=False, K=0), (0, 0)),
        (JointPrompt(s=0), (0, 0)),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_number_of_launches(problem, launches, device, large_blocks):
    before = launch.launches()
    run(problem, device)
    between = launch.launches()
    run(problem.backward, device)
    assert (between - before, launch.launches() - between) == launches


def test_at_the_start_it_is_prompt_tuning_exactly(device, large_blocks):
    """β, U and B are zero: the prompt's own bits, times ρ; and gradients are finite though C is zero."""
    parameters = JointPrompt(a=4).parameters(device)
    for i in (2, 3, 7):
        parameters[i].zero_()
    options = JointPrompt(a=4).options()
    assert torch.equal(kernels.joint_prompt(*parameters, *options), options[1] * parameters[0])
    gradients = kernels.joint_prompt_backward(JointPrompt().grad_output(device), *parameters, *options)
    assert all(torch.isfinite(x).all() for x in gradients)


def test_two_runs_give_equal_bits(device):
    problem = JointPrompt(s=17, d=33, m=33, a=4)
    with configured(SMALLEST):
        runs = [(*run(problem, device), *run(problem.backward, device)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_of_several_types(device, large_blocks):
    parameters = JointPrompt(a=4).parameters(device)
    mixed = [x.to(t) for x, t in zip(parameters, (torch.float16, torch.float32, torch.bfloat16) * 3, strict=True)]
    options, grad = JointPrompt(a=4).options(), JointPrompt(a=4).grad_output(device)
    exact = ept_kernels.joint_prompt_backward_reference(*in_float64((grad, *mixed)), *options)
    for name, a, e, x in zip(NAMES, kernels.joint_prompt_backward(grad, *mixed, *options), exact, mixed, strict=True):
        assert a.dtype == x.dtype, name
        assert_close(a, e, name)
    exact = ept_kernels.joint_prompt_reference(*in_float64(mixed), *options)
    assert_close(kernels.joint_prompt(*mixed, *options), exact, "output")


def test_the_kernels_are_given_one_type(device):
    """A compiled program that chooses among several tensors needs them to have one type; the interpreter does not."""
    problem = JointPrompt(a=4)
    *parameters, G = problem.parameters(device)
    with launch.watched() as launched:
        for last in (G, G.bfloat16()):
            kernels.joint_prompt(*parameters, last, *problem.options())
            kernels.joint_prompt_backward(problem.grad_output(device), *parameters, last, *problem.options())
    given = [
        {x.dtype for x in args if isinstance(x, Tensor)}
        for kernel, _, args, *_ in launched
        if kernel is kernels.joint_prompt_products_kernel
    ]
    assert given == [{torch.float32}] * 4


@pytest.mark.parametrize(
    "problem", [JointPrompt(s=32_800, d=1), JointPrompt(s=10_000, d=1, m=210_000, r=1)], ids=["products", "scores"]
)
def test_more_numbers_than_32_bits_count_are_refused(problem, device):
    """Before anything of that size is allocated."""
    for refused in (problem, problem.backward):
        with pytest.raises(ValueError, match=f"of {problem.s} prompt rows, .* use a shorter prompt"):
            run(refused, device)


def test_gradient_of_a_sum_is_read_through_its_zero_strides(device):
    parameters, options = JointPrompt().parameters(device), JointPrompt().options()
    ones = torch.ones((), device=device).expand(parameters[0].shape)
    expanded = kernels.joint_prompt_backward(ones, *parameters, *options)
    dense = kernels.joint_prompt_backward(ones.contiguous(), *parameters, *options)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_gradient_of_the_prompt_alone_is_contiguous_and_rounded_once(device):
    problem = JointPrompt(K=0, fusion=False)
    grad = problem.grad_output(device).T.contiguous().T.half()
    grad_prompt, *_ = kernels.joint_prompt_backward(grad, *problem.parameters(device), *problem.options())
    assert grad_prompt.is_contiguous()
    assert_close(grad_prompt, problem.options()[1] * grad.double(), "prompt")


@pytest.mark.parametrize("problem", [JointPrompt(a=4), JointPrompt(strided=True)], ids=lambda p: p.name)
def test_opcheck(problem, device, monkeypatch, large_blocks):
    monkeypatch.undo()  # opcheck compares outputs of several runs, also where nothing is to be written
    for checked in (problem, problem.backward):
        results = torch.library.opcheck(getattr(ept_kernels, checked.operator), checked.inputs(device))
        assert set(results.values()) == {"SUCCESS"}, results


def test_problems_cover_what_is_promised():
    promised = {
        "d": {64, 100, 768, 1000, 4096},
        "s": {0, 1, 40, 100},
        "r": {0, 1, 30, 64},
        "K": {0, 1, 4, 8},
        "h": {1, 2, 3, 4, 64},
        "m": {1, 63, 256},
        "activation": set(ACTIVATIONS),
        "dtype": {torch.float32, torch.float16, torch.bfloat16},
        "strided": {True, False},
        "fusion": {True, False},
    }
    for field, values in promised.items():
        assert values <= {getattr(p, field) for p in PROBLEMS}, field
    assert {p.a > 0 for p in PROBLEMS} == {True, False}
