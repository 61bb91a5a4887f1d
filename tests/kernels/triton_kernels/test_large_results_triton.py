"""Tensors of more than 2³¹ elements, in memory that is mostly untouched: only the programs of the last rows run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import INTERPRETED, mostly_untouched
from torch import Tensor

from ept_kernels import launch
from ept_kernels.dev.problems import Activation, PromptedEmbedding, RMSNorm, Rotary, TokenUpdate
from ept_kernels.library import launcher_of
from ept_kernels.problem import Problem, as_tuple
from ept_kernels.prompted_embedding.launchers import token_at

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can run a few programs of a grid")

F16, WIDTH = torch.float16, 1024
TEXTS = {"n": 3, "d": WIDTH, "s": 2, "batch": 2, "dtype": F16, "ids": torch.int32}
EMBEDDING = PromptedEmbedding(m=4, **TEXTS)
NORM = RMSNorm(8, WIDTH, dtype=F16, residual=True)
GATED = Activation((8, WIDTH), dtype=F16)
RELU = Activation((8, WIDTH), dtype=F16, operator="relu")

# The numbers of the arguments that have a row for each text or token.
LONG: list[tuple[Problem, tuple[int, ...]]] = [
    (EMBEDDING, (0, 1, 8)),
    (TokenUpdate(**TEXTS), (0, 1)),
    (NORM, (0, 2)),
    (NORM.backward, (0, 1, 3, 4)),
    (Rotary(2, 4, 4, 2, WIDTH // 4, WIDTH // 4, F16), (0, 1, 2, 3)),
    (GATED, (0, 1)),
    (GATED.backward, (0, 1, 2)),
    (RELU, (0,)),
    (RELU.backward, (0, 1)),
]


@pytest.fixture(autouse=True)
def every_text_is_a_run() -> Iterator[None]:
    with launch.configured({launch.key("prompted_embedding", F16): {"PROGRAMS": 2**31}}):
        yield


def inputs_of(problem: Problem) -> list[Any]:
    """The texts of `EMBEDDING` have all positions, and none: different programs write them."""
    inputs = [x[0] if isinstance(x, Tensor) and x.shape[0] == 1 else x for x in problem.inputs()]
    if problem is EMBEDDING:
        inputs[1][1] = -1
        inputs.append(token_at(inputs[1], EMBEDDING.m))
    return inputs


def reserved(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that are contiguous, and as many below them as an offset that wraps round in 32 bits goes back."""
    return mostly_untouched(2**31 + math.prod(shape), dtype)[2**31 :].view(shape)


def preceded(x: Tensor, times: int) -> Tensor:
    """The rows of `x` behind zeros, so many times as many rows in all."""
    long = reserved((times * x.shape[0], *x.shape[1:]), x.dtype)
    long[-x.shape[0] :] = x
    return long


def run_last(monkeypatch: pytest.MonkeyPatch, texts: int, few: int) -> None:
    """Of each kind of programs, of which there are equally many for each of the `texts`, runs those of the last `few`;
    of other grids the last programs.
    """
    from triton.runtime.interpreter import interpreter_builder

    launch_all, number, numbers = launch.launch, interpreter_builder.create_get_program_id, [0]

    def launch_few(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        each = grid[0] // texts
        kinds = (each - 1, 1) if kernel.__name__ == "prompted_embedding_kernel" else (each,)
        end, chosen = 0, list[int]()
        for count in kinds:
            end += count * texts
            chosen += range(end - count * few, end)
        numbers[:] = chosen or range(grid[0] - few, grid[0])
        launch_all(kernel, (len(numbers), *grid[1:]), *args, **meta)

    def chosen_number(axis: int) -> Any:
        handle = number(axis)
        if axis == 0:
            handle.data = handle.data + (numbers[int(handle.data[0])] - handle.data)
        return handle

    monkeypatch.setattr(launch, "launch", launch_few)
    monkeypatch.setattr(interpreter_builder, "create_get_program_id", chosen_number)


@pytest.mark.parametrize("problem, long", LONG, ids=[problem.operator for problem, _ in LONG])
def test_results_of_more_than_32_bits_of_elements(problem, long, monkeypatch):
    launcher: Any = launcher_of(problem.operator)
    inputs = inputs_of(problem)
    right = as_tuple(launcher(*inputs))
    times = 2**31 // max(x.numel() for x in right) + 2
    new_empty = torch.Tensor.new_empty

    def allocate(x: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if math.prod(shape) < 2**31:
            return new_empty(x, shape, dtype=dtype or x.dtype, **options)
        return reserved(shape, dtype or x.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    few = inputs[long[0]].shape[0]
    run_last(monkeypatch, times * few, few)
    found = as_tuple(launcher(*(preceded(x, times) if i in long else x for i, x in enumerate(inputs))))
    assert max(x.numel() for x in found) > 2**31
    for actual, expected in zip(found, right, strict=True):
        assert torch.equal(actual[-expected.shape[0] :], expected)
