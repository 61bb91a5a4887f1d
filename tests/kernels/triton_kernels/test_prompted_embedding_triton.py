"""The Triton kernels of the prompted embedding against their references in float64."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import ept_kernels
from ept_kernels import launch
from ept_kernels.prompted_embedding import configs as prompted_embedding_configs
from ept_kernels.prompted_embedding import launchers as kernels

VOCABULARY = 37
SCALE = 1.7
FLOAT32_TOLERANCE = 1e-5  # of the sum of the magnitudes that were added up


@dataclass(frozen=True)
class Problem:
    """Sizes of a padded batch. `padding`: which side, or `shuffled` positions in no order; `adapters`: mixed."""

    n: int = 63
    d: int = 64
    s: int = 5
    m: int = 70
    r: int = 3
    batch: int = 3
    padding: str = "right"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    adapters: int = 0
    strided: bool = False

    @property
    def id(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != self.__dataclass_fields__[k].default}
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "plain"

    def positions(self) -> Tensor:
        """`[batch, n]`: row b has 7·b tokens of padding, as far as there are so many."""
        rows = []
        for b in range(self.batch):
            padding = 0 if self.padding == "none" else min(7 * b, self.n)
            text = torch.arange(min(self.n - padding, self.m))
            if self.padding == "shuffled":
                text = torch.randperm(self.m, generator=torch.Generator().manual_seed(b))[: text.numel()]
            fill = torch.full((self.n - text.numel(),), -1)
            rows.append(torch.cat([fill, text] if self.padding == "left" else [text, fill]))
        return torch.stack(rows) if rows else torch.empty(0, self.n, dtype=torch.int64)

    def inputs(self, device: torch.device | str = "cpu") -> tuple:
        g = torch.Generator().manual_seed(0)
        lead = (self.adapters,) if self.adapters else ()
        ids = torch.randint(0, VOCABULARY, (self.batch, self.n), generator=g).to(self.ids)
        table = torch.randn(VOCABULARY, self.d, generator=g).to(self.dtype)
        shapes = [(self.s, self.d), (self.m, self.r), (self.r, self.d)]
        parameters = [torch.randn(*lead, *shape, generator=g).to(self.parameters) for shape in shapes]
        tensors = [x.to(device) for x in (ids, self.positions().to(self.ids), table, *parameters)]
        if self.strided:
            tensors = [strided(x) for x in tensors]
        adapter_ids = None
        if self.adapters:  # none, the last one, …, the first, none, …
            adapter_ids = (-torch.arange(self.batch) % (self.adapters + 1) - 1).to(device, self.ids)
        return *tensors, SCALE, adapter_ids

    def grad_output(self, device: torch.device | str = "cpu") -> Tensor:
        g = torch.Generator().manual_seed(1)
        grad = torch.randn(self.batch, self.s + self.n, self.d, generator=g).to(device, self.dtype)
        return strided(grad) if self.strided else grad


PROBLEMS = [
    Problem(),
    # sizes: narrow, odd, wider than a tile, more rows than a run of tiles
    Problem(d=100, s=40, r=30, padding="left", dtype=torch.bfloat16),
    Problem(d=768, n=256, s=40, m=256, r=30, batch=2),
    Problem(d=1000, s=100, r=64, batch=2, dtype=torch.float16, ids=torch.int32),
    Problem(d=4096, n=20, s=1, m=30, r=30, batch=2, padding="none", dtype=torch.bfloat16, ids=torch.int32),
    Problem(d=4096, n=1, s=40, m=256, r=1, batch=1),
    Problem(d=64, n=256, s=0, m=300, r=64, padding="left"),
    Problem(d=20, n=300, s=2, m=200, r=17, padding="shuffled", ids=torch.int32),
    Problem(r=130, m=20, n=9),
    Problem(batch=40, n=3, m=4),
    # empty parts
    Problem(n=1, s=0, r=1, m=1, padding="none"),
    Problem(r=0, s=40, dtype=torch.float16),
    Problem(s=0, r=0, dtype=torch.bfloat16),
    Problem(n=0),
    Problem(batch=0),
    # layouts and types
    Problem(d=100, strided=True, padding="left"),
    Problem(d=100, strided=True, adapters=2, dtype=torch.float16),
    Problem(d=100, r=30, parameters=torch.bfloat16, dtype=torch.bfloat16),
    Problem(d=100, r=30, parameters=torch.float16, dtype=torch.float32),
    # mixed adapters, some rows with none
    Problem(adapters=1, batch=4),
    Problem(adapters=3, batch=6, d=100, s=40, r=30, padding="left", dtype=torch.bfloat16, ids=torch.int32),
    Problem(adapters=3, batch=5, r=0),
    Problem(adapters=2, batch=0),
]
by_id = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN, or an index far outside, until a kernel writes it."""
    new_empty = torch.Tensor.new_empty

    def poisoned_new_empty(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps in every dimension, what lies between them being NaN or an index far outside."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    wide = torch.full([2 * size + 1 for size in x.shape], poison, dtype=x.dtype, device=x.device)
    wide[tuple(slice(1, None, 2) for _ in x.shape)] = x
    return wide[tuple(slice(1, None, 2) for _ in x.shape)]


def in_float64(function, *args, magnitude: bool = False):
    """`function` of `args` in float64; of their magnitudes, which bounds the sums, on request."""
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    return function(*(x.abs() if magnitude and torch.is_tensor(x) and x.is_floating_point() else x for x in wide))


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, what: str) -> None:
    assert actual.shape == exact.shape, what
    tolerance = FLOAT32_TOLERANCE * magnitude
    if actual.dtype != torch.float32:
        # Half a unit for rounding; for bfloat16 a whole one under the interpreter, which truncates. On a GPU the
        # factors of a product may have been rounded to TF32, which has 10 bits.
        interpreted = actual.device.type == "cpu"
        unit = torch.finfo(actual.dtype).eps * (1 if interpreted and actual.dtype == torch.bfloat16 else 0.5)
        tolerance = tolerance + unit * exact.abs() + torch.finfo(actual.dtype).smallest_normal
        if not interpreted:
            tolerance = tolerance + 2**-10 * magnitude
    error = (actual.double() - exact).abs() - tolerance
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert (error <= 0).all(), f"{what}: {int((error > 0).sum())} of {error.numel()} off, the worst by {error.max()}"


def backward_args(problem: Problem, device: torch.device) -> tuple:
    _, positions, _, _, A, B, scale, adapter_ids = problem.inputs(device)
    return problem.grad_output(device), positions, A, B, scale, adapter_ids


@by_id
def test_forward_equals_the_reference(problem, device):
    args = problem.inputs(device)
    actual = kernels.prompted_embedding(*args)
    reference = ept_kernels.prompted_embedding_reference
    assert actual.dtype == problem.dtype
    assert_close(actual, in_float64(reference, *args), in_float64(reference, *args, magnitude=True), "output")


@by_id
def test_backward_equals_the_reference(problem, device):
    args = backward_args(problem, device)
    actual = kernels.prompted_embedding_backward(*args)
    reference = ept_kernels.prompted_embedding_backward_reference
    exact, magnitude = in_float64(reference, *args), in_float64(reference, *args, magnitude=True)
    for name, a, e, size in zip(("grad_prompt", "grad_A", "grad_B"), actual, exact, magnitude, strict=True):
        assert a.dtype == problem.parameters
        assert_close(a, e, size, name)


@dataclass(frozen=True)
class Packed:
    lengths: tuple[int, ...]
    s: int = 5
    d: int = 64
    r: int = 3
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    strided: bool = False
    id: str = "plain"

    def inputs(self, device: torch.device) -> tuple:
        longest = max(self.lengths, default=0)
        inner = Problem(n=sum(self.lengths), batch=1, s=self.s, d=self.d, r=self.r, m=longest, dtype=self.dtype)
        ids, _, table, prompt, A, B, _, _ = inner.inputs(device)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0)
        tensors = [ids[0].to(self.ids), cu_seqlens.to(device, self.ids), table, prompt, A, B]
        return *(strided(x) if self.strided else x for x in tensors), SCALE


PACKED = [
    Packed((3, 1, 70)),
    Packed((63,), s=40, d=100, r=30, dtype=torch.bfloat16, ids=torch.int32, id="one text"),
    Packed((0, 3, 0, 0, 40, 1, 0), s=40, r=30, d=100, dtype=torch.float16, id="empty texts"),
    Packed((0, 3, 0, 0, 40, 1, 0), s=0, d=100, ids=torch.int32, id="empty texts, no prompt"),
    Packed((1,) * 130, s=1, d=20, ids=torch.int32, id="many texts"),
    Packed((0, 0, 0), id="no tokens"),
    Packed((), id="no texts"),
    Packed((5, 33), r=0, dtype=torch.bfloat16, id="no update"),
    Packed((5, 33, 4), strided=True, id="strided"),
    Packed((20, 13), d=1000, s=33, r=64, id="wide"),
    Packed((256, 256, 1), d=20, s=2, r=1, id="runs of tiles"),
    Packed((63, 2), d=768, s=100, id="long prompt"),
    Packed((9, 1), d=4096, s=1, r=30, dtype=torch.bfloat16, id="wide and narrow texts"),
]


@pytest.mark.parametrize("problem", PACKED, ids=lambda p: p.id)
def test_packed_equals_the_reference(problem, device):
    args = problem.inputs(device)
    actual = kernels.prompted_embedding_packed(*args)
    reference = ept_kernels.prompted_embedding_packed_reference
    assert actual.dtype == problem.dtype
    assert_close(actual, in_float64(reference, *args), in_float64(reference, *args, magnitude=True), "output")


def test_no_update_and_a_negative_adapter_leave_the_tables_bits(device):
    """Also where A and B hold what must not be touched: nothing of a row without an update is multiplied."""
    problem = Problem(adapters=2, batch=3, s=2)
    ids, positions, table, prompt, A, B, scale, _ = problem.inputs(device)
    out = kernels.prompted_embedding(ids, positions, table, prompt, A, B, scale, torch.full((3,), -1, device=device))
    assert torch.equal(out[:, :2], prompt[-1].expand(3, -1, -1))
    assert torch.equal(out[:, 2:], table[ids])
    out = kernels.prompted_embedding(ids, torch.full_like(positions, -1), table, prompt[0], A[0], B[0], scale)
    assert torch.equal(out[:, 2:], table[ids])
    out = kernels.prompted_embedding(ids, positions, table, prompt[0], A[0, :0], B[0], scale)
    assert torch.equal(out[:, 2:], table[ids])


def test_backward_does_not_read_rows_without_an_update(device):
    problem = Problem(adapters=2, batch=3, s=2, padding="left")
    grad, positions, A, B, scale, adapter_ids = backward_args(problem, device)
    of_prompt = torch.zeros(3, 2, dtype=torch.bool, device=device)
    unread = torch.cat([of_prompt, positions < 0], 1) | (adapter_ids < 0)[:, None]
    assert unread.any(1).sum() >= 2
    grads = [grad.masked_fill(unread[..., None], value) for value in (0.0, float("nan"))]
    results = [kernels.prompted_embedding_backward(g, positions, A, B, scale, adapter_ids) for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_a_sum_is_read_through_its_zero_strides(device):
    grad, *rest = backward_args(Problem(s=2), device)
    ones = torch.ones((), dtype=grad.dtype, device=device).expand(grad.shape)
    expanded = kernels.prompted_embedding_backward(ones, *rest)
    dense = kernels.prompted_embedding_backward(ones.contiguous(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("adapters", [0, 3])
def test_two_runs_give_equal_bits(adapters, device):
    problem = Problem(d=100, s=40, r=30, batch=6, adapters=adapters)
    runs = [
        (
            kernels.prompted_embedding(*problem.inputs(device)),
            *kernels.prompted_embedding_backward(*backward_args(problem, device)),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"BLOCK_T": 16, "BLOCK_M": 16, "ITERS": 1, "BLOCK_R": 32, "BLOCK_E": 64, "BLOCK_P": 2},
        {"BLOCK_T": 64, "BLOCK_M": 128, "BLOCK_D": 32, "ITERS": 9, "BLOCK_N": 16, "BLOCK_P": 32},
        {"ITERS": 2, "STAGES": 1, "BLOCK_R": 64},
    ],
    ids=["small", "large", "runs of two"],
)
def test_any_launch_configuration_is_right(change, device):
    """A tuner may choose any of them."""
    with contextlib.ExitStack() as stack:
        for kernel, default in prompted_embedding_configs.CONFIGS.items():
            named = {name: value for name, value in change.items() if name in default}
            stack.enter_context(launch.trying(prompted_embedding_configs.key(kernel, torch.float32), named))
        test_forward_equals_the_reference(Problem(d=100, n=90, s=3, r=30, m=80, batch=2), device)
        test_backward_equals_the_reference(Problem(d=100, n=90, s=3, r=30, m=80, batch=2, padding="shuffled"), device)
        test_packed_equals_the_reference(Packed((3, 1, 70), d=100), device)


@pytest.mark.parametrize(
    "problem, forward, backward",
    [(Problem(), 1, 3), (Problem(adapters=2), 1, 3), (Problem(r=0), 1, 1), (Problem(n=0), 1, 1), (Problem(s=0), 1, 3)],
    ids=lambda x: getattr(x, "id", str(x)),
)
def test_number_of_launches(problem, forward, backward, device):
    before = launch.launches()
    kernels.prompted_embedding(*problem.inputs(device))
    between = launch.launches()
    kernels.prompted_embedding_backward(*backward_args(problem, device))
    assert (between - before, launch.launches() - between) == (forward, backward)
    before = launch.launches()
    kernels.prompted_embedding_packed(*Packed((3, 1, 70)).inputs(device))
    assert launch.launches() - before == 1


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same values with offsets beyond 2³¹ elements along `dim`, in memory that is reserved but mostly untouched.

    It reaches as far below the first element: an offset that wraps round in 32 bits reads zeros there.
    """
    if x.dim() < -dim:
        return x
    half = 2**31
    strides = list(x.contiguous().stride())
    strides[dim] = -(-half // (x.shape[dim] - 1)) + 64
    length = half + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, length * x.element_size(), flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no address space for {length} elements: {error}")
    far = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides, half)
    far.copy_(x)
    return far


@pytest.mark.parametrize("dim", [-1, -2, -3], ids=["columns", "rows", "adapters"])
def test_offsets_have_64_bits(dim, device):
    if device.type != "cpu":
        pytest.skip("a GPU has no memory that is reserved but untouched; offsets are the same under the interpreter")
    small = {"dtype": torch.float16, "parameters": torch.float16, "ids": torch.int32}  # address space is finite
    problem = Problem(n=6, d=20, s=3, m=8, r=3, batch=4, adapters=3 if dim == -3 else 0, **small)
    args = problem.inputs(device)
    far = [far_apart(x, dim) if torch.is_tensor(x) and x.dim() > 1 else x for x in args]
    assert sum(x is not y for x, y in zip(args, far, strict=True)) >= 3
    assert torch.equal(kernels.prompted_embedding(*far), kernels.prompted_embedding(*args))

    args = backward_args(problem, device)
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
            assert values <= {getattr(p, field) for p in PACKED}, f"{field} of packed texts"
    assert promised["n"] <= {length for p in PACKED for length in p.lengths}
    assert any(-1 in p.inputs()[-1] for p in PROBLEMS if p.adapters and p.batch)
    assert replace(Problem(), batch=1).id == "batch=1"
