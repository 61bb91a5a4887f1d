"""The Triton kernels of the token-dependent update against their references in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, far_apart, launches_of, rounding

from ept_kernels import launch
from ept_kernels.dev.problems import TokenUpdate
from ept_kernels.library import reference_of
from ept_kernels.problem import TF32, as_tuple, in_float64
from ept_kernels.token_update import launchers as kernels

FLOAT32_TOLERANCE = 1e-5  # of the sum of the magnitudes that were added up

PROBLEMS = [
    TokenUpdate(),
    # sizes: narrow, odd, wider than a tile, more tokens than one program goes through
    TokenUpdate(d=100, s=40, r=30, padding="left", dtype=torch.bfloat16),
    TokenUpdate(d=768, n=40, s=40, r=30, batch=2),
    TokenUpdate(d=1000, n=33, s=100, r=64, batch=2, dtype=torch.float16, ids=torch.int32),
    TokenUpdate(d=4096, n=20, s=1, r=3, batch=2, padding="none", dtype=torch.bfloat16, ids=torch.int32),
    TokenUpdate(d=20, n=300, s=2, r=17, padding="shuffled", ids=torch.int32),
    TokenUpdate(r=130, n=9),
    TokenUpdate(r=kernels.MAX_RANK, n=5, d=20, dtype=torch.bfloat16),
    TokenUpdate(r=kernels.MAX_RANK + 1, n=5, d=20, dtype=torch.bfloat16),
    TokenUpdate(batch=40, n=3),
    TokenUpdate(batch=1, n=1, s=0, r=1, padding="none"),
    # empty parts
    TokenUpdate(s=0, dtype=torch.bfloat16),
    TokenUpdate(n=0),
    TokenUpdate(batch=0),
    TokenUpdate(r=0),
    # layouts and types
    TokenUpdate(d=100, strided=True, padding="left"),
    TokenUpdate(d=100, strided=True, dtype=torch.float16),
    TokenUpdate(d=100, r=30, parameters=torch.bfloat16, dtype=torch.bfloat16),
    TokenUpdate(d=100, r=30, parameters=torch.float16, dtype=torch.float32),
]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(problem: TokenUpdate, device: torch.device) -> None:
    inputs = problem.inputs(device)
    magnitudes = [x.abs() if torch.is_tensor(x) and x.is_floating_point() else x for x in in_float64(inputs)]
    sums = as_tuple(reference_of(problem.operator)(*magnitudes))
    actual = as_tuple(getattr(kernels, problem.operator)(*inputs))
    for i, (a, e, size) in enumerate(zip(actual, problem.expected(*inputs), sums, strict=True)):
        what = f"result {i} of {problem.operator}"
        last = i == len(actual) - 1  # activations, or their gradients
        assert a.dtype == (torch.float32 if last else problem.dtype if len(actual) == 2 else problem.parameters), what
        assert a.shape == e.shape, what
        tolerance = FLOAT32_TOLERANCE * size + rounding(a, e)
        if not INTERPRETED and problem.dtype != torch.float32:  # factors may have been cut off to TF32
            tolerance = tolerance + TF32 * size
        error = (a.double() - e).abs() - tolerance
        assert torch.isfinite(error).all(), f"{what}: not finite"
        assert (error <= 0).all(), f"{what}: {int((error > 0).sum())} of {error.numel()} off, by {error.max()}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_forward_and_backward_equal_the_reference(problem, device):
    check(problem, device)
    check(problem.backward, device)


def test_no_update_leaves_the_tables_bits_and_multiplies_nothing(device):
    ids, positions, table, prompt, *parts, scale = TokenUpdate(s=2).inputs(device)
    parts = [torch.full_like(part, float("nan")) for part in parts]
    out, hidden = kernels.prompted_embedding_by_token(ids, torch.full_like(positions, -1), table, prompt, *parts, scale)
    assert torch.equal(out[:, :2], prompt.expand(3, -1, -1))
    assert torch.equal(out[:, 2:], table[ids])
    assert not hidden.any()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_ids_outside_the_table_give_nan_and_read_nothing(ids, device):
    outside = torch.tensor([-100, -1, 37, torch.iinfo(ids).max, torch.iinfo(ids).min], dtype=ids, device=device)
    inputs = list(TokenUpdate(n=12, ids=ids).inputs(device))
    right, _ = kernels.prompted_embedding_by_token(*inputs)
    inputs[0], inputs[1] = inputs[0].clone(), inputs[1].clone()
    inputs[0][0, :5] = inputs[0][2, -5:] = outside
    assert (inputs[1][0, :5] >= 0).all()
    inputs[1][2, -5:] = -1
    right[0, 5:10], right[2, -5:] = float("nan"), float("nan")
    out, _ = kernels.prompted_embedding_by_token(*inputs)
    torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)


def test_a_diverged_bottleneck_is_not_hidden_by_the_activation(device):
    inputs = list(TokenUpdate(padding="none", s=0).inputs(device))
    inputs[4][:] = float("nan")  # W_in
    out, hidden = kernels.prompted_embedding_by_token(*inputs)
    assert hidden.isnan().all()
    assert out.isnan().all()


def test_backward_does_not_read_tokens_without_an_update(device):
    grad, ids, positions, table, *rest = TokenUpdate(batch=3, s=2, padding="left").backward.inputs(device)
    unread = torch.cat([torch.zeros(3, 2, dtype=torch.bool, device=device), positions < 0], 1)
    assert unread.any(1).sum() >= 2
    ids = ids.masked_fill(positions < 0, 2**40)
    grads = [grad.masked_fill(unread[..., None], value) for value in (0.0, float("nan"))]
    results = [kernels.prompted_embedding_by_token_backward(g, ids, positions, table, *rest) for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_a_sum_is_read_through_its_zero_strides(device):
    grad, *rest = TokenUpdate(s=2).backward.inputs(device)
    ones = torch.ones((), dtype=grad.dtype, device=device).expand(grad.shape)
    expanded = kernels.prompted_embedding_by_token_backward(ones, *rest)
    dense = kernels.prompted_embedding_by_token_backward(ones.contiguous(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_two_runs_give_equal_bits(device):
    for p in (TokenUpdate(n=70, d=40, batch=4), TokenUpdate(n=70, d=40, batch=4).backward):
        runs = [as_tuple(getattr(kernels, p.operator)(*p.inputs(device))) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"BLOCK_T": 16, "BLOCK_D": 16, "PROGRAMS": 1, "BLOCK_E": 64, "BLOCK_P": 2},
        {"BLOCK_D": 128, "BLOCK_P": 32, "num_stages": 1},
        {"PROGRAMS": 9},
    ],
    ids=["small", "wide", "runs of tiles"],
)
def test_any_launch_configuration_is_right(change, device):
    """A tuner may choose any of them."""
    with launch.configured(
        {
            launch.key(kernel, torch.float16): {name: value for name, value in change.items() if name in default}
            for kernel, default in kernels.CONFIGS.items()
        }
    ):
        problem = TokenUpdate(d=100, n=90, s=3, r=30, batch=2, dtype=torch.float16)
        check(problem, device)
        check(replace(problem, padding="shuffled").backward, device)


def test_number_of_launches(device):
    too_wide = TokenUpdate(2, 20, r=kernels.MAX_RANK + 1)  # the reference
    for problem, forward, backward in ((TokenUpdate(9), 1, 3), (TokenUpdate(9, s=0), 1, 3), (too_wide, 0, 0)):
        assert launches_of(kernels.prompted_embedding_by_token, *problem.inputs(device)) == forward
        assert launches_of(kernels.prompted_embedding_by_token_backward, *problem.backward.inputs(device)) == backward


def test_offsets_have_64_bits(device):
    """Of the table and the gradient, which may have any strides; the memory between is reserved and not touched."""
    if device.type != "cpu":
        pytest.skip("a GPU has no memory that is reserved but untouched; offsets are the same under the interpreter")
    small = {"dtype": torch.float16, "parameters": torch.float16, "ids": torch.int32}  # address space is finite
    problem = TokenUpdate(n=6, d=20, s=3, batch=4, padding="none", **small)
    for p, index in ((problem, 2), (problem.backward, 0), (problem.backward, 3)):
        for dim in (-1, -2, -3):
            args = list(p.inputs(device))
            near = as_tuple(getattr(kernels, p.operator)(*args))
            args[index] = far_apart(args[index], dim)
            far = as_tuple(getattr(kernels, p.operator)(*args))
            assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
