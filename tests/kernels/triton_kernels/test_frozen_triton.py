"""The Triton kernels of the frozen model's element-wise work against their references in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import launches_of, mostly_untouched, rounding
from tiny_models import make_model

from ept.model.frozen import restore_frozen, swap_frozen
from ept_kernels import launch
from ept_kernels.dev.problems import Activation, RMSNorm, Rotary
from ept_kernels.frozen import launchers as kernels
from ept_kernels.frozen.reference import FORMS
from ept_kernels.library import reference_of
from ept_kernels.problem import as_tuple, in_float64

F16, BF16 = torch.float16, torch.bfloat16
FLOAT32_TOLERANCE = 2e-6  # of the magnitude of what was added up

NORMS = [
    RMSNorm(),
    RMSNorm(residual=True),
    # forms, types, odd and wide rows, fewer rows than a program takes
    *(
        RMSNorm(rows, d, form, dtype)
        for form in ("llama", "gemma")
        for rows, d, dtype in ((63, 100, BF16), (3, 1000, F16))
    ),
    RMSNorm(2, 4096, "olmo", BF16, residual=True),
    RMSNorm(1, 12000, residual=True),
    RMSNorm(1, 20000, residual=True),  # too wide for a kernel
    RMSNorm(7, 768, "t5", torch.float32, weight=BF16),
    RMSNorm(7, 768, "t5", BF16),
    RMSNorm(130, 1),
    RMSNorm(2, 2**15 + 1),  # wider than a program: the reference
    RMSNorm(0),
    RMSNorm(5, 100, strided=True, residual=True),
]
ROTARIES = [
    Rotary(),
    Rotary(1, 32, 8, 3, 128, 128, BF16, shared=True),
    Rotary(2, 3, 1, 7, 20, 20, F16),
    Rotary(columns=4, width=15),
    Rotary(width=64, columns=48, interleaved=True, dtype=BF16),
    Rotary(interleaved=True, shared=True),
    Rotary(3, 17, 17, 1),
    Rotary(n=0),
    Rotary(columns=0),
    Rotary(strided=True, columns=8),
]
ACTIVATIONS = [
    *(
        Activation(activation=name, dtype=t)
        for name in ("silu", "gelu", "gelu_tanh", "relu")
        for t in (torch.float32, BF16)
    ),
    Activation((2, 3, 2049), dtype=F16),
    Activation((0, 5)),
    Activation((9, 11), strided=True),
]
RELUS = [Activation(shape, dtype=t, operator="relu") for shape, t in (((3, 43), BF16), ((5000,), F16), ((0,), F16))]
PROBLEMS = [
    *(x for problem in [*NORMS, *ACTIVATIONS, *RELUS] for x in (problem, problem.backward)),
    *(replace(problem, is_backward=is_backward) for problem in ROTARIES for is_backward in (False, True)),
]
pytestmark = pytest.mark.usefixtures("poisoned")


def allowed_of_norm(problem: RMSNorm, inputs: tuple, actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Bounds a norm's error: the sum with the residual, the normalised rows and their product are rounded in turn."""
    size = exact.abs()
    if problem.operator == "rms_norm_backward":  # whose two summands may cancel
        grad_output, _, weight, rstd = in_float64(inputs)[:4]
        size = size + grad_output.abs() * (1 + weight.abs().max()) * rstd
    rounded = actual.to(problem.dtype) if problem.residual else actual
    return FLOAT32_TOLERANCE * size.amax(-1, keepdim=True) + 3 * rounding(rounded, exact)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_kernels_equal_the_reference(problem, device):
    inputs = problem.inputs(device)
    launcher, reference = getattr(kernels, problem.operator), reference_of(problem.operator)
    magnitudes = as_tuple(reference(*(x.abs() if torch.is_tensor(x) else x for x in in_float64(inputs))))
    of_reference, of_kernel = as_tuple(reference(*inputs)), as_tuple(launcher(*inputs))
    results = zip(of_kernel, problem.expected(*inputs), of_reference, magnitudes, strict=True)
    for i, (actual, exact, like, magnitude) in enumerate(results):
        assert (actual.shape, actual.dtype, actual.stride()) == (like.shape, like.dtype, like.stride()), i
        if actual.dtype == torch.uint8:
            assert torch.equal(actual, like)
            continue
        if isinstance(problem, RMSNorm) and exact.numel():
            allowed = allowed_of_norm(problem, inputs, actual, exact)
        else:
            largest = magnitude.abs().amax() if magnitude.numel() else 0
            allowed = FLOAT32_TOLERANCE * largest + rounding(actual, exact)
        error = (actual.double() - exact).abs() - allowed
        assert torch.isfinite(error).all(), f"result {i}: not finite"
        assert (error <= 0).all(), f"result {i}: {int((error > 0).sum())} off, the worst by {error.max()}"


@pytest.mark.parametrize(
    "problem", [RMSNorm(residual=True), Rotary(), Activation(), RELUS[0]], ids=lambda p: p.operator
)
def test_one_launch_and_equal_bits_on_two_runs(problem, device):
    for p in (problem, replace(problem, is_backward=True) if problem.operator == "rotary" else problem.backward):
        inputs, launcher = p.inputs(device), getattr(kernels, p.operator)
        first = as_tuple(launcher(*inputs))
        assert launches_of(launcher, *inputs) == 1
        assert all(torch.equal(a, b) for a, b in zip(first, as_tuple(launcher(*inputs)), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_rounds_where_its_family_does(form, device):
    """The sum with the residual, and the rows before the weight or not; all but a few bits are the reference's."""
    inputs = RMSNorm(8, 250, form, F16, residual=True).inputs(device)
    out, total, rstd = kernels.rms_norm(*inputs)
    like, like_total, like_rstd = reference_of("rms_norm")(*inputs)
    assert torch.equal(total, like_total)
    torch.testing.assert_close(rstd, like_rstd, rtol=1e-6, atol=0)
    assert (out != like).float().mean() < 0.01


def test_not_a_number_passes(device):
    x = torch.tensor([float("nan"), -1.0, 2.0, float("inf"), -float("inf")], device=device)
    out, passes = kernels.relu(x)
    torch.testing.assert_close(out, torch.relu(x), equal_nan=True)
    torch.testing.assert_close(kernels.relu_backward(torch.ones_like(x), passes).cpu(), torch.tensor([1.0, 0, 1, 1, 0]))
    assert kernels.gated_activation(x, torch.ones_like(x), "relu").isnan().tolist() == x.isnan().tolist()


def test_rows_beyond_two_to_the_31_elements(device):
    """Rows far apart: the kernel's addresses are 64-bit."""
    if device.type != "cpu":
        pytest.skip("a CPU alone has memory that nobody touches: `make test` runs it under the interpreter")
    heads, width = 2, 4
    memory = mostly_untouched(2**31 + 64, torch.float32)
    q = torch.as_strided(memory, (2, heads, 1, width), (2**31, width, heads * width, 1))
    q.copy_(torch.arange(q.numel(), dtype=torch.float32).view_as(q))
    cos, sin = (torch.full((1, 1, width), value) for value in (0.0, 1.0))
    turned, _ = kernels.rotary(q, q, cos, sin)
    torch.testing.assert_close(turned, torch.cat([-q[..., 2:], q[..., :2]], -1))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_whole_models_step_on_the_kernels(name, device):
    model = make_model(name).to(device).requires_grad_(False)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    labels = torch.arange(10, device=device).view(2, 5)
    results = []
    for change in (swap_frozen, restore_frozen):
        assert change(model) > 0
        before = launch.launches()
        output = model(inputs_embeds=embeds, labels=labels)
        results.append((output.logits, *torch.autograd.grad(output.loss, [embeds])))
        assert (launch.launches() > before) == (change is swap_frozen)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
