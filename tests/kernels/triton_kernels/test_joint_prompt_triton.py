"""The Triton kernels of the joint prompt and its backward against their references in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ept_kernels
from ept_kernels import launch
from ept_kernels.joint_prompt import configs as joint_prompt_configs
from ept_kernels.joint_prompt import launchers as kernels
from ept_kernels.joint_prompt.reference import ACTIVATIONS

NAMES = ("prompt", "A", "B", "beta", "W_q", "W_k", "D", "U", "G")
FLOAT32_TOLERANCE = 1e-5  # of the largest magnitude of a result, or of what it is the sum of

# Fewer and larger programs than are shipped: the interpreter's time goes by their number.
LARGE = {
    "joint_prompt_products": {"BLOCK_N": 128, "BLOCK_K": 256},
    "joint_prompt": {"BLOCK_S": 64, "BLOCK_D": 512, "BLOCK_M": 128, "PARTS": 2},
    "joint_prompt_backward": {"BLOCK_S": 64, "BLOCK_D": 1024, "BLOCK_M": 128, "BLOCK_R": 64, "PARTS": 2},
}


@dataclass(frozen=True)
class Problem:
    """Sizes of a joint prompt; 0 switches a part off. `large`: run in the blocks of `LARGE`."""

    s: int = 5
    d: int = 64
    m: int = 7
    r: int = 3
    K: int = 4
    h: int = 2
    a: int = 0
    fusion: bool = True
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # of p, A and B
    strided: bool = False
    large: bool = False

    @property
    def id(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != self.__dataclass_fields__[k].default}
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "plain"

    def parameters(self, device: torch.device) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        columns, gates = self.K * self.h, self.K if self.K > 1 else 0
        # shape, and size of the entries: such that scores, gates and activations are of order one
        entries = {
            "prompt": ((self.s, self.d), self.scale),
            "A": ((self.m, self.r), self.scale),
            "B": ((self.r, self.d), self.scale),
            "beta": ((int(self.fusion),), 1.0),
            "W_q": ((self.d, self.a), self.d**-0.5),
            "W_k": ((self.d, self.a), self.d**-0.5),
            "D": ((self.d, columns), self.d**-0.5),
            "U": ((columns, self.d), 1.0),
            "G": ((self.d, gates), self.d**-0.5),
        }
        tensors = [(torch.randn(shape, generator=g) * size).to(self.dtype) for shape, size in entries.values()]
        return [(strided(x) if self.strided else x).to(device) for x in tensors]

    def options(self) -> tuple:
        score_scale = 2.0 / self.a**0.5 if self.a else 8.0 / self.d  # so that the softmax is not saturated
        return 1.3, 0.7, score_scale, self.activation

    def grad_output(self, device: torch.device) -> Tensor:
        grad = torch.randn(self.s, self.d, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return (strided(grad) if self.strided else grad).to(device)

    def blocks(self) -> contextlib.AbstractContextManager:
        return configured(LARGE) if self.large else contextlib.nullcontext()


PROBLEMS = [
    *(Problem(activation=name) for name in ACTIVATIONS),
    # sizes: narrow, odd, wider and longer than a tile, several tiles of everything
    Problem(s=40, d=33, m=63, r=30),
    Problem(s=40, d=100, m=63, r=30, h=4, large=True),
    Problem(s=40, d=768, m=256, r=30, large=True),
    Problem(s=100, d=1000, m=256, r=64, K=8, h=4, large=True),
    Problem(s=100, d=4096, m=63, r=30, K=8, h=3, a=20, large=True),
    Problem(s=1, d=4096, m=1, r=1, K=1, h=1, large=True),
    Problem(s=1, d=20, m=256, r=64, large=True),
    Problem(s=33, d=33, m=65, r=17, K=3, h=11, large=True),
    Problem(s=2, d=40, m=5, r=70, a=33, large=True),
    # parts that are off
    Problem(s=0),
    Problem(r=0),
    Problem(r=0, a=3),
    Problem(m=0),
    Problem(K=0),
    Problem(K=0, r=0),
    Problem(K=1, h=3),
    Problem(K=8, h=1, fusion=False),
    Problem(K=20, h=1, fusion=False, r=0),
    Problem(K=0, fusion=False),
    Problem(h=0, fusion=False),  # a gate without spaces
    # maps
    Problem(a=4, K=0),
    Problem(s=40, d=100, m=63, r=30, a=16, activation="silu", large=True),
    Problem(a=5, fusion=False),
    # types, layouts, sizes of the entries
    Problem(dtype=torch.bfloat16, a=4),
    Problem(dtype=torch.float16, s=17, m=40),
    Problem(strided=True, a=4),
    Problem(strided=True, dtype=torch.bfloat16),
    Problem(scale=1e-3, activation="tanh"),
    Problem(scale=20.0, s=40, m=63, large=True),
]
by_id = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(float("nan")))


@contextlib.contextmanager
def configured(configs: dict[str, dict[str, int]]):
    with contextlib.ExitStack() as stack:
        for kernel, config in configs.items():
            for key in {joint_prompt_configs.key(kernel, a) for a in (0, 1)}:
                stack.enter_context(launch.trying(key, config))
        yield


def strided(x: Tensor) -> Tensor:
    """The same values with gaps of NaN in every dimension."""
    wide = torch.full([2 * size + 1 for size in x.shape], float("nan"), dtype=x.dtype)
    wide[tuple(slice(1, None, 2) for _ in x.shape)] = x
    return wide[tuple(slice(1, None, 2) for _ in x.shape)]


def forward(problem: Problem, device: torch.device) -> Tensor:
    with problem.blocks():
        return kernels.joint_prompt(*problem.parameters(device), *problem.options())


def backward(problem: Problem, device: torch.device) -> tuple[Tensor, ...]:
    with problem.blocks():
        grad_output = problem.grad_output(device)
        return kernels.joint_prompt_backward(grad_output, *problem.parameters(device), *problem.options())


def assert_close(actual: Tensor, exact: Tensor, what: str, summand: Tensor | None = None) -> None:
    """`summand`: a large part of the sum, should it cancel with others."""
    assert actual.shape == exact.shape, what
    if not exact.numel():
        return
    magnitude = max(x.abs().max().item() for x in (exact, summand) if x is not None)
    tolerance = FLOAT32_TOLERANCE * magnitude + torch.finfo(torch.float32).smallest_normal
    if actual.dtype != torch.float32:
        # Half a unit for rounding; for bfloat16 a whole one, because the interpreter truncates.
        unit = torch.finfo(actual.dtype).eps * (1 if actual.dtype == torch.bfloat16 else 0.5)
        tolerance = tolerance + unit * exact.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - exact).abs()
    assert torch.isfinite(error).all(), f"{what}: not finite"
    assert (error <= tolerance).all(), f"{what}: {error.max()} off, where {magnitude} were added up"


@by_id
def test_forward_equals_the_reference(problem, device):
    exact = ept_kernels.joint_prompt_reference(*(x.double() for x in problem.parameters(device)), *problem.options())
    actual = forward(problem, device)
    assert actual.dtype == problem.dtype
    assert_close(actual, exact, "output")


@by_id
def test_backward_equals_the_reference(problem, device):
    wide = [x.double() for x in (problem.grad_output(device), *problem.parameters(device))]
    exact = ept_kernels.joint_prompt_backward_reference(*wide, *problem.options())
    for name, a, e in zip(NAMES, backward(problem, device), exact, strict=True):
        assert a.dtype == problem.dtype, name
        assert a.is_contiguous(), name
        assert_close(a, e, name, problem.options()[1] * wide[0] if name == "prompt" else None)


@pytest.mark.parametrize(
    "blocks",
    [
        {
            "joint_prompt_products": {"BLOCK_N": 16, "BLOCK_K": 16},
            "joint_prompt": {"BLOCK_S": 16, "BLOCK_D": 32, "BLOCK_M": 16, "PARTS": 3},
            "joint_prompt_backward": {"BLOCK_S": 16, "BLOCK_D": 32, "BLOCK_M": 16, "BLOCK_R": 16, "PARTS": 3},
        },
        {
            "joint_prompt_products": {"BLOCK_N": 64, "BLOCK_K": 128},
            "joint_prompt": {"BLOCK_S": 32, "BLOCK_D": 128, "BLOCK_M": 32, "PARTS": 1},
            "joint_prompt_backward": {"BLOCK_S": 64, "BLOCK_D": 64, "BLOCK_M": 32, "BLOCK_R": 32, "PARTS": 1},
        },
    ],
    ids=["small", "large"],
)
@pytest.mark.parametrize("a", [0, 20], ids=["plain", "maps"])
def test_any_launch_configuration_is_right(blocks, a, device):
    """A tuner may choose any of them; tiles of every kind number more than one."""
    problem = Problem(s=20, d=70, m=40, r=20, K=3, h=7, a=a)
    with configured(blocks):
        test_forward_equals_the_reference(problem, device)
        test_backward_equals_the_reference(problem, device)


@pytest.mark.parametrize(
    "problem, launches",
    [
        (Problem(), 2),
        (Problem(a=4), 2),
        (Problem(K=0), 2),
        (Problem(fusion=False), 2),
        (Problem(fusion=False, K=0), 1),
        (Problem(s=0), 0),
    ],
    ids=lambda x: getattr(x, "id", str(x)),
)
def test_number_of_launches(problem, launches, device):
    before = launch.launches()
    forward(problem, device)
    between = launch.launches()
    backward(problem, device)
    assert (between - before, launch.launches() - between) == (launches, launches)


def test_at_the_start_it_is_prompt_tuning_exactly(device):
    """β, U and B are zero: the prompt's own bits, times ρ; and gradients are finite though C is zero."""
    parameters = Problem(a=4).parameters(device)
    for i in (2, 3, 7):
        parameters[i].zero_()
    options = Problem(a=4).options()
    assert torch.equal(kernels.joint_prompt(*parameters, *options), options[1] * parameters[0])
    gradients = kernels.joint_prompt_backward(Problem().grad_output(device), *parameters, *options)
    assert all(torch.isfinite(x).all() for x in gradients)


def test_two_runs_give_equal_bits(device):
    problem = Problem(s=20, d=70, m=40, r=20, a=4)
    runs = [(forward(problem, device), *backward(problem, device)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_of_several_types(device):
    parameters = Problem(a=4).parameters(device)
    mixed = [x.to(t) for x, t in zip(parameters, (torch.float16, torch.float32, torch.bfloat16) * 3, strict=True)]
    options, grad = Problem(a=4).options(), Problem(a=4).grad_output(device)
    exact = ept_kernels.joint_prompt_backward_reference(grad.double(), *(x.double() for x in mixed), *options)
    for name, a, e, x in zip(NAMES, kernels.joint_prompt_backward(grad, *mixed, *options), exact, mixed, strict=True):
        assert a.dtype == x.dtype, name
        assert_close(a, e, name)
    exact = ept_kernels.joint_prompt_reference(*(x.double() for x in mixed), *options)
    assert_close(kernels.joint_prompt(*mixed, *options), exact, "output")


def test_the_kernels_are_given_one_type(device, monkeypatch):
    """Compiled, a program that chooses among several tensors needs them of one type; the interpreter does not."""
    given = []

    def noted(kernel, grid, *args, **options):
        if kernel is kernels.joint_prompt_products_kernel:
            given.append({x.dtype for x in args[:-2] if isinstance(x, Tensor)})  # the last two: products, shape
        launch.launch(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", noted)
    *parameters, G = Problem(a=4).parameters(device)
    for last in (G, G.bfloat16()):
        kernels.joint_prompt(*parameters, last, *Problem(a=4).options())
        kernels.joint_prompt_backward(Problem(a=4).grad_output(device), *parameters, last, *Problem(a=4).options())
    assert given == [{torch.float32}] * 4


def test_gradient_of_a_sum_is_read_through_its_zero_strides(device):
    parameters, options = Problem().parameters(device), Problem().options()
    ones = torch.ones((), device=device).expand(parameters[0].shape)
    expanded = kernels.joint_prompt_backward(ones, *parameters, *options)
    dense = kernels.joint_prompt_backward(ones.contiguous(), *parameters, *options)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("problem", [Problem(a=4), Problem(strided=True)], ids=lambda p: p.id)
@pytest.mark.parametrize("name", ["joint_prompt", "joint_prompt_backward"])
def test_opcheck(name, problem, device, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs of several runs, also where nothing is to be written
    arguments = [*problem.parameters(device), *problem.options()]
    if name == "joint_prompt_backward":
        arguments.insert(0, problem.grad_output(device))
    results = torch.library.opcheck(getattr(ept_kernels, name), tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}, results


def test_problems_cover_what_is_promised():
    promised = {
        "d": {64, 100, 768, 1000, 4096},
        "s": {0, 1, 40, 100},
        "r": {0, 1, 30, 64},
        "K": {0, 1, 4, 8},
        "h": {1, 2, 3, 4},
        "m": {1, 63, 256},
        "activation": set(ACTIVATIONS),
        "dtype": {torch.float32, torch.float16, torch.bfloat16},
        "strided": {True, False},
        "fusion": {True, False},
    }
    for field, values in promised.items():
        assert values <= {getattr(p, field) for p in PROBLEMS}, field
    assert {p.a > 0 for p in PROBLEMS} == {True, False}
