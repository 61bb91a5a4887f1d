"""Tensors of shapes that do not fit each other are refused: a kernel would read memory that is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ept_kernels.dev.problems import Activation, JointPrompt, PackedEmbedding, PromptedEmbedding, RMSNorm, Rotary
from ept_kernels.library import launcher_of
from ept_kernels.problem import Problem

MIXED = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2, adapters=2)
PLAIN = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2)
JOINT = JointPrompt(s=3, d=12, r=2, a=4)

# By the problem: the number of an argument, how much is left of it, and what is named.
WRONG = [
    (PLAIN, 1, (slice(1),), "positions"),  # which a reference would repeat for every text
    (PLAIN, 3, (..., slice(7)), "prompt"),
    (PLAIN, 5, (..., slice(7)), "B"),
    (MIXED, 3, (0,), "prompt"),
    (MIXED, 5, (slice(1),), "B"),
    (MIXED, 7, (slice(2),), "adapter_ids"),
    (PLAIN.backward, 1, (slice(2),), "token_at"),
    (PLAIN.backward, 3, (..., slice(7)), "B"),
    (MIXED.backward, 5, (slice(2),), "adapter_ids"),
    (PackedEmbedding((3, 4), d=8), 3, (..., slice(7)), "prompt"),
    (PackedEmbedding((3, 4), d=8), 5, (slice(2),), "B"),
    *((JOINT, i, (slice(1),), name) for i, name in enumerate(("B", None, "W_q", "W_k", "D", "U", "G"), 2) if name),
    (JOINT, 6, (..., slice(7)), "D"),  # eight columns of four spaces
    (JOINT.backward, 0, (slice(2),), "grad_output"),
    (RMSNorm(residual=True), 1, (slice(8),), "weight"),
    (RMSNorm(residual=True), 2, (..., slice(2), slice(None)), "residual"),
    (RMSNorm(residual=True).backward, 0, (..., slice(2), slice(None)), "grad_output"),
    (RMSNorm(residual=True).backward, 3, (..., slice(2), slice(None)), "rstd"),
    (RMSNorm(residual=True).backward, 4, (..., slice(2), slice(None)), "grad_h"),
    (Rotary(), 1, (slice(1),), "k"),
    (Rotary(), 2, (slice(None), slice(2)), "cos"),
    (Rotary(), 3, (slice(None), slice(2)), "sin"),
    (Activation(), 1, (slice(1),), "up"),
    (Activation().backward, 1, (slice(1),), "gate"),
    (Activation(operator="relu").backward, 1, (slice(2),), "passes"),
]


@pytest.mark.parametrize("problem, index, left, name", WRONG, ids=[f"{p.operator} {name}" for p, _, _, name in WRONG])
def test_a_shape_that_does_not_fit_is_refused_and_named(problem: Problem, index: int, left: Any, name: str, device):
    launcher: Any = launcher_of(problem.operator)
    inputs = list(problem.inputs(device))
    launcher(*inputs)
    inputs[index] = inputs[index][left]
    with pytest.raises(ValueError, match=rf"^{name} has shape \[.*\], by the others it has to be"):
        launcher(*inputs)


@pytest.mark.parametrize("adapters", [0, 2])
def test_adapters_and_their_ids_come_together(adapters, device):
    launcher: Any = launcher_of("prompted_embedding")
    inputs = list((MIXED if adapters else PLAIN).inputs(device))
    inputs[-1] = None if adapters else torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^adapter_ids has shape"):
        launcher(*inputs)
