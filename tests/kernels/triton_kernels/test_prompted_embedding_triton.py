"""The Triton kernels of the prompted embedding against their references in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, far_apart, launches_of, rounding
from torch import Tensor

from ept_kernels import launch
from ept_kernels.dev.problems import PackedEmbedding as Packed
from ept_kernels.dev.problems import PromptedEmbedding
from ept_kernels.library import reference_of
from ept_kernels.problem import TF32, Problem, as_tuple, in_float64
from ept_kernels.prompted_embedding import launchers as kernels
from ept_kernels.prompted_embedding.reference import prompted_embedding_reference, token_at_reference

FLOAT32_TOLERANCE = 1e-5  # of the sum of the magnitudes that were added up

PROBLEMS = [
    PromptedEmbedding(),
    # sizes: narrow, odd, wider than a tile, more rows than a run of tiles
    PromptedEmbedding(d=100, s=40, r=30, padding="left", dtype=torch.bfloat16),
    PromptedEmbedding(d=768, n=256, s=40, m=256, r=30, batch=2),
    PromptedEmbedding(d=1000, s=100, r=64, batch=2, dtype=torch.float16, ids=torch.int32),
    PromptedEmbedding(d=4096, n=20, s=1, m=30, r=30, batch=2, padding="none", dtype=torch.bfloat16, ids=torch.int32),
    PromptedEmbedding(d=4096, n=1, s=40, m=256, r=1, batch=1),
    PromptedEmbedding(d=64, n=256, s=0, m=300, r=64, padding="left"),
    PromptedEmbedding(d=20, n=300, s=2, m=200, r=17, padding="shuffled", ids=torch.int32),
    PromptedEmbedding(n=20, m=200, padding="shuffled"),  # positions that no text has, and some beyond its length
    PromptedEmbedding(r=130, m=20, n=9),
    PromptedEmbedding(batch=40, n=3, m=4),
    # empty parts
    PromptedEmbedding(n=1, s=0, r=1, m=1, padding="none"),
    PromptedEmbedding(r=0, s=40, dtype=torch.float16),
    PromptedEmbedding(s=0, r=0, dtype=torch.bfloat16),
    PromptedEmbedding(n=0),
    PromptedEmbedding(batch=0),
    # layouts and types
    PromptedEmbedding(d=100, strided=True, padding="left"),
    PromptedEmbedding(d=100, strided=True, adapters=2, dtype=torch.float16),
    PromptedEmbedding(d=100, r=30, parameters=torch.bfloat16, dtype=torch.bfloat16),
    PromptedEmbedding(d=100, r=30, parameters=torch.float16, dtype=torch.float32),
    # mixed adapters, some rows with none
    PromptedEmbedding(adapters=1, batch=4),
    PromptedEmbedding(adapters=3, batch=6, d=100, s=40, r=30, padding="left", dtype=torch.bfloat16, ids=torch.int32),
    PromptedEmbedding(adapters=3, batch=5, r=0),
    PromptedEmbedding(adapters=2, batch=0),
]
by_name = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, what: str) -> None:
    assert actual.shape == exact.shape, what
    tolerance = FLOAT32_TOLERANCE * magnitude + rounding(actual, exact)
    if actual.dtype != torch.float32 and not INTERPRETED:  # the factors of a product may have been cut off to TF32
        tolerance = tolerance + TF32 * magnitude
    error = (actual.double() - exact).abs() - tolerance
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert (error <= 0).all(), f"{what}: {int((error > 0).sum())} of {error.numel()} off, the worst by {error.max()}"


# Fewer and larger programs than are shipped, for wide problems: the interpreter's time goes by their number.
LARGE = {
    "prompted_embedding": {"BLOCK_T": 32, "BLOCK_D": 512, "num_warps": 32},
    "prompted_embedding_backward": {"BLOCK_M": 64, "BLOCK_D": 512},
    "prompted_embedding_reduce": {"BLOCK_E": 4096},
}


def check(problem: Problem, device: torch.device) -> None:
    is_wide = INTERPRETED and problem.d >= 768
    with launch.configured({launch.key(k, problem.dtype): c for k, c in LARGE.items()} if is_wide else {}):
        check_as_configured(problem, device)


def check_as_configured(problem: Problem, device: torch.device) -> None:
    inputs = problem.inputs(device)
    reference = reference_of(problem.operator)
    magnitudes = [x.abs() if torch.is_tensor(x) and x.is_floating_point() else x for x in in_float64(inputs)]
    actual, magnitude = as_tuple(getattr(kernels, problem.operator)(*inputs)), as_tuple(reference(*magnitudes))
    for i, (a, e, size) in enumerate(zip(actual, problem.expected(*inputs), magnitude, strict=True)):
        assert a.dtype == (problem.dtype if len(actual) == 1 else problem.parameters)
        assert_close(a, e, size, f"result {i} of {problem.operator}")


@by_name
def test_forward_and_backward_equal_the_reference(problem, device):
    check(problem, device)
    check(problem.backward, device)


PACKED = {
    "plain": Packed(),
    "one text": Packed((63,), s=40, d=100, r=30, dtype=torch.bfloat16, ids=torch.int32),
    "empty texts": Packed((0, 3, 0, 0, 40, 1, 0), s=40, r=30, d=100, dtype=torch.float16),
    "empty texts, no prompt": Packed((0, 3, 0, 0, 40, 1, 0), s=0, d=100, ids=torch.int32),
    "many texts": Packed((1,) * 50, s=1, d=20, ids=torch.int32),
    "no tokens": Packed((0, 0, 0)),
    "no texts": Packed(()),
    "no update": Packed((5, 33), r=0, dtype=torch.bfloat16),
    "strided": Packed((5, 33, 4), strided=True),
    "wide": Packed((20, 13), d=1000, s=33, r=64),
    "no update, one long text among short ones": Packed((1, 0, 90, 2, 1), r=0, d=20),
    "short and long texts": Packed((33, 2, 256, 256, 1), d=20, s=2, r=1),
    "long prompt": Packed((63, 2), d=768, s=100),
    "wide and narrow texts": Packed((9, 1), d=4096, s=1, r=30, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("problem", PACKED.values(), ids=PACKED)
def test_packed_equals_the_reference(problem, device):
    check(problem, device)


def test_no_update_and_a_negative_adapter_leave_the_tables_bits(device):
    """Also where A and B hold what must not be touched: nothing of a row without an update is multiplied."""
    problem = PromptedEmbedding(adapters=2, batch=3, s=2)
    ids, positions, table, prompt, A, B, scale, _ = problem.inputs(device)
    table[:, 0] = -0.0
    out = kernels.prompted_embedding(ids, positions, table, prompt, A, B, scale, torch.full((3,), -1, device=device))
    assert torch.equal(out[:, :2], prompt[-1].expand(3, -1, -1))
    assert torch.equal(out[:, 2:].view(torch.int32), table[ids].view(torch.int32))
    out = kernels.prompted_embedding(ids, torch.full_like(positions, -1), table, prompt[0], A[0], B[0], scale)
    assert torch.equal(out[:, 2:].view(torch.int32), table[ids].view(torch.int32))
    out = kernels.prompted_embedding(ids, positions, table, prompt[0], A[0, :0], B[0], scale)
    assert torch.equal(out[:, 2:].view(torch.int32), table[ids].view(torch.int32))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_ids_outside_the_table_give_nan_and_read_nothing(ids, device):
    """A label left in, an id beyond the table, the largest and the smallest there are: with an update and without."""
    outside = [-100, -1, 37, torch.iinfo(ids).max, torch.iinfo(ids).min]
    inputs = list(PromptedEmbedding(n=12, ids=ids).inputs(device))
    right = kernels.prompted_embedding(*inputs)
    inputs[0] = inputs[0].clone()
    inputs[0][0, :5] = torch.tensor(outside, dtype=ids)
    inputs[0][2, -5:] = torch.tensor(outside, dtype=ids)
    assert (inputs[1][0, :5] >= 0).all()
    inputs[1] = inputs[1].clone()
    inputs[1][2, -5:] = -1
    right[0, 5:10], right[2, -5:] = float("nan"), float("nan")
    torch.testing.assert_close(kernels.prompted_embedding(*inputs), right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_packed_ids_outside_the_table_and_texts_longer_than_A_give_nan_and_read_nothing(ids, device):
    inputs = list(Packed((3, 9), s=2, ids=ids).inputs(device))
    right = kernels.prompted_embedding_packed(*inputs)
    inputs[0] = inputs[0].clone()
    inputs[0][:5] = torch.tensor([-100, -1, 37, torch.iinfo(ids).max, torch.iinfo(ids).min], dtype=ids)
    inputs[4] = inputs[4][:7]
    right[[2, 3, 4, 7, 8]], right[14:] = float("nan"), float("nan")  # rows 0, 1 and 5, 6 are the prompt's
    torch.testing.assert_close(kernels.prompted_embedding_packed(*inputs), right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("r", [3, 0])
def test_packed_texts_longer_than_A_are_written_to_their_end(r, device, monkeypatch):
    """NaN behind A's last row, the table's bits without an update; neither is what memory held, here zeros."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    problem = Packed((3, 90, 0, 20, 21, 1), s=2, r=r)
    inputs = list(problem.inputs(device))
    right = kernels.prompted_embedding_packed(*inputs)
    assert (right != 0).any(1).all()
    inputs[4] = inputs[4][:20]
    behind = torch.cat([torch.arange(-problem.s, length) >= 20 for length in problem.lengths])
    right[behind.to(device) & (r > 0)] = float("nan")
    torch.testing.assert_close(kernels.prompted_embedding_packed(*inputs), right, rtol=0, atol=0, equal_nan=True)


def test_a_diverged_adapter_does_not_reach_rows_without_one(device):
    """−1, none, counts from the end as an index: the last adapter's B must not even be multiplied by zero."""
    problem = PromptedEmbedding(adapters=2, batch=2, s=2, padding="none")
    ids, positions, table, prompt, A, B, scale, _ = problem.inputs(device)
    B[1] = float("nan")
    adapter_ids = torch.tensor([0, -1], device=device)
    for function in (kernels.prompted_embedding, prompted_embedding_reference):
        for given in (positions, torch.tensor([[1], [0]], device=device) * (positions + 1) - 1):
            out = function(ids, given, table, prompt, A, B, scale, adapter_ids)
            assert torch.equal(out[1, 2:], table[ids[1]])
            assert out.isfinite().all()


@pytest.mark.parametrize("adapter", [2, -3, 2**40, -(2**40)])
def test_an_adapter_that_there_is_not_gives_nan_and_reads_nothing(adapter, device):
    inputs = list(PromptedEmbedding(adapters=2, padding="none").inputs(device))
    inputs[-1] = torch.tensor([1, 0, 1], device=device)
    right = kernels.prompted_embedding(*inputs)
    inputs[-1] = torch.tensor([1, adapter, 1], device=device)
    right[1] = float("nan")
    torch.testing.assert_close(kernels.prompted_embedding(*inputs), right, rtol=0, atol=0, equal_nan=True)


def test_positions_outside_A_give_nan_and_no_gradient(device):
    problem = PromptedEmbedding(batch=2, n=9, padding="none")
    inputs, of_backward = list(problem.inputs(device)), list(problem.backward.inputs(device))
    right = kernels.prompted_embedding(*inputs)
    inputs[1] = of_backward[1] = inputs[1].clone()
    inputs[1][1, 3:5] = torch.tensor([problem.m, 2**40])
    right[1, problem.s + 3 : problem.s + 5] = float("nan")
    torch.testing.assert_close(kernels.prompted_embedding(*inputs), right, rtol=0, atol=0, equal_nan=True)
    without = [*of_backward[:1], of_backward[1].masked_fill(of_backward[1] >= problem.m, -1), *of_backward[2:]]
    results = [kernels.prompted_embedding_backward(*arguments) for arguments in (of_backward, without)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_of_two_tokens_at_one_position_one_is_nan(device):
    inputs = list(PromptedEmbedding(batch=1, n=4, m=4, padding="none").inputs(device))
    inputs[1] = torch.tensor([[0, 2, 2, 3]], device=device)
    out = kernels.prompted_embedding(*inputs)
    assert out[0, 6].isnan().all()
    assert torch.isfinite(out[0, [*range(6), 7, 8]]).all()


@by_name
def test_token_at_equals_the_reference(problem, device):
    positions = problem.inputs(device)[1]
    for m in (problem.m, 5):  # also where texts are longer
        assert torch.equal(kernels.token_at(positions, m), token_at_reference(positions, m))


def test_a_token_alone_at_an_edge_of_a_tile_is_found(device):
    block = kernels.TOKEN_AT["BLOCK_M"]
    positions = torch.tensor([0, block - 1, block, 2 * block - 1], device=device)[:, None]
    assert torch.equal(kernels.token_at(positions, 2 * block), token_at_reference(positions, 2 * block))


def test_backward_does_not_read_rows_without_an_update(device):
    problem = PromptedEmbedding(adapters=2, batch=3, s=2, padding="left")
    grad, positions, A, B, scale, adapter_ids = problem.backward.inputs(device)
    of_prompt = torch.zeros(3, 2, dtype=torch.bool, device=device)
    unread = torch.cat([of_prompt, positions < 0], 1) | (adapter_ids < 0)[:, None]
    assert unread.any(1).sum() >= 2
    grads = [grad.masked_fill(unread[..., None], value) for value in (0.0, float("nan"))]
    results = [kernels.prompted_embedding_backward(g, positions, A, B, scale, adapter_ids) for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_a_sum_is_read_through_its_zero_strides(device):
    grad, *rest = PromptedEmbedding(s=2).backward.inputs(device)
    ones = torch.ones((), dtype=grad.dtype, device=device).expand(grad.shape)
    expanded = kernels.prompted_embedding_backward(ones, *rest)
    dense = kernels.prompted_embedding_backward(ones.contiguous(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("adapters", [0, 3])
def test_two_runs_give_equal_bits(adapters, device):
    problem = PromptedEmbedding(n=20, d=40, s=33, m=35, batch=4, adapters=adapters)
    for p in (problem, problem.backward):
        runs = [as_tuple(getattr(kernels, p.operator)(*p.inputs(device))) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"BLOCK_T": 16, "BLOCK_M": 16, "PROGRAMS": 1, "BLOCK_R": 32, "BLOCK_E": 64, "BLOCK_P": 2},
        {"BLOCK_T": 64, "BLOCK_M": 64, "BLOCK_D": 32, "BLOCK_P": 32, "num_warps": 8},
        {"STAGES": 1, "BLOCK_R": 64, "PROGRAMS": 9},
    ],
    ids=["small", "large", "runs of two"],
)
def test_any_launch_configuration_is_right(change, device):
    """A tuner may choose any of them."""
    with launch.configured(
        {
            launch.key(kernel, torch.float32): {name: value for name, value in change.items() if name in default}
            for kernel, default in kernels.CONFIGS.items()
        }
    ):
        check(PromptedEmbedding(d=100, n=90, s=3, r=30, m=80, batch=2), device)
        check(PromptedEmbedding(d=100, n=90, s=3, r=30, m=80, batch=2, padding="shuffled").backward, device)
        check(Packed((3, 1, 70), d=100), device)
        check(Packed((3, 1, 70), d=100, r=0), device)


@pytest.mark.parametrize(
    "problem, forward, backward",
    [
        (PromptedEmbedding(9, m=10), 2, 3),
        (PromptedEmbedding(9, m=10, adapters=2), 2, 3),
        (PromptedEmbedding(9, m=10, r=0), 1, 1),
        (PromptedEmbedding(n=0), 1, 1),
        (PromptedEmbedding(9, m=10, s=0), 2, 3),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_number_of_launches(problem, forward, backward, device):
    inputs, of_backward = problem.inputs(device), problem.backward.inputs(device)
    assert launches_of(kernels.prompted_embedding, *inputs) == forward
    assert launches_of(kernels.prompted_embedding_backward, *of_backward) == backward
    if problem.r and problem.n:  # the table of positions is made once, and handed on
        token_at = kernels.token_at(inputs[1], problem.m)
        assert launches_of(kernels.prompted_embedding, *inputs, token_at) == forward - 1
        assert launches_of(kernels.prompted_embedding_backward, *of_backward, token_at) == backward - 1
    assert launches_of(kernels.prompted_embedding_packed, *Packed((3, 1, 7)).inputs(device)) == 1


def test_positions_that_no_text_has_do_not_lengthen_the_runs(device):
    """Of 13 tiles of positions two have tokens, with one of the prompt: enough for each of nine texts to be a run."""
    problem = PromptedEmbedding(n=20, m=200, batch=9)
    config = {launch.key(problem.operator, problem.dtype): {"BLOCK_T": 16, "PROGRAMS": 27}}
    with launch.configured(config), launch.watched() as launched:
        kernels.prompted_embedding(*problem.inputs(device))
    assert launched[-1].grid == ((13 + 1) * 9 + 9 * 2,)


@pytest.mark.parametrize("dim", [-1, -2, -3], ids=["columns", "rows", "adapters"])
def test_offsets_have_64_bits(dim, device):
    if device.type != "cpu":
        pytest.skip("a GPU has no memory that is reserved but untouched; offsets are the same under the interpreter")
    small = {"dtype": torch.float16, "parameters": torch.float16, "ids": torch.int32}  # address space is finite
    problem = PromptedEmbedding(6, 20, 3, 8, 3, 4, "none", adapters=3 if dim == -3 else 0, **small)
    args = problem.inputs(device)
    far = [far_apart(x, dim) if torch.is_tensor(x) and x.dim() > 1 else x for x in args]
    assert sum(x is not y for x, y in zip(args, far, strict=True)) >= 3
    assert torch.equal(kernels.prompted_embedding(*far), kernels.prompted_embedding(*args))

    args = problem.backward.inputs(device)
    far = [far_apart(x, dim) if torch.is_tensor(x) and x.dim() > 1 else x for x in args]
    pairs = zip(kernels.prompted_embedding_backward(*far), kernels.prompted_embedding_backward(*args), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    args = Packed((3, 0, 4), d=20, dtype=torch.float16, ids=torch.int32).inputs(device)
    far = [far_apart(x, dim) if torch.is_tensor(x) and x.dim() >= -dim else x for x in args]
    assert torch.equal(kernels.prompted_embedding_packed(*far), kernels.prompted_embedding_packed(*args))


def test_problems_cover_what_is_promised():
    promised = {
        "d": {64, 100, 768, 1000, 4096},
        "n": {1, 63, 256},
        "r": {0, 1, 30, 64},
        "s": {0, 1, 40, 100},
        "padding": {"left", "right", "none"},
        "dtype": {torch.float32, torch.float16, torch.bfloat16},
        "ids": {torch.int32, torch.int64},
        "strided": {True, False},
    }
    for field, values in promised.items():
        assert values <= {getattr(p, field) for p in PROBLEMS}, field
        if field not in ("n", "padding"):
            assert values <= {getattr(p, field) for p in PACKED.values()}, f"{field} of packed texts"
    assert promised["n"] <= {length for p in PACKED.values() for length in p.lengths}
    assert any(-1 in p.inputs()[-1] for p in PROBLEMS if p.adapters and p.batch)
    assert replace(PromptedEmbedding(), batch=1).name == "prompted_embedding batch=1"
