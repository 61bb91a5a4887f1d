"""Tensors of shapes that do not fit each other are refused: a kernel would read memory that is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_checks import JOINT, MIXED, PLAIN, WRONG_SHAPES, made_wrong

from ept_kernels.dev.problems import Activation
from ept_kernels.library import launcher_of
from ept_kernels.problem import Problem


@pytest.mark.parametrize(
    "problem, index, left, name", WRONG_SHAPES, ids=[f"{p.operator} {name}" for p, _, _, name in WRONG_SHAPES]
)
def test_a_shape_that_does_not_fit_is_refused_and_named(problem: Problem, index: Any, left: Any, name: str, device):
    launcher: Any = launcher_of(problem.operator)
    inputs = problem.inputs(device)
    launcher(*inputs)
    with pytest.raises(ValueError, match=rf"^{name} has shape \[.*\], but the other arguments require"):
        launcher(*made_wrong(inputs, index, left))


@pytest.mark.parametrize(
    "problem", [Activation(), Activation().backward, JOINT, JOINT.backward], ids=lambda p: p.operator
)
def test_an_unknown_activation_is_refused_and_named(problem: Problem, device):
    launcher: Any = launcher_of(problem.operator)
    with pytest.raises(ValueError, match=r"^activation is 'swish', expected one of"):
        launcher(*problem.inputs(device)[:-1], "swish")


@pytest.mark.parametrize("adapters", [0, 2])
def test_adapters_and_their_ids_come_together(adapters, device):
    launcher: Any = launcher_of("prompted_embedding")
    inputs = list((MIXED if adapters else PLAIN).inputs(device))
    inputs[-1] = None if adapters else torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^prompt has shape"):
        launcher(*inputs)
