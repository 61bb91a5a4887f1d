"""Prepared launches: the direct call is what Triton would have chosen for the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction

from ept_kernels import launch
from ept_kernels.dev import compile_only
from ept_kernels.dev.problems import FourBit, JointPrompt, PromptedEmbedding, opcheck_problems
from ept_kernels.library import launcher_of


class Gpu:
    """Stands in for Triton and a GPU: binds arguments as Triton does, compiles and runs nothing, and notes the rest."""

    def __init__(self) -> None:
        self.bound = 0  # launches that Triton looked at
        self.launched: list[Any] = []

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        if warmup:
            return None
        self.bound += 1
        bound, specialization, options = kernel.device_caches["sm_90"][-1](*args, **meta)
        form = (kernel.fn.__name__, str(specialization), str(options))
        compiled = type("Compiled", (), {"__getitem__": lambda _, grid: lambda *args: self.note(form, grid, args)})()
        compiled[(*grid, 1, 1)[:3]](*bound.values())
        return compiled

    def note(self, form: Any, grid: Any, args: tuple[Any, ...]) -> None:
        values = [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in args]
        self.launched.append((form, grid, values))

    def launches(self, launcher: Any, args: tuple[Any, ...]) -> list[Any]:
        self.launched = []
        launcher(*args)
        return self.launched


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **meta: gpu.run(kernel, *args, **meta))
    with compile_only.driving("sm_90"):
        yield gpu


EMBEDDING = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2)
PRODUCT = FourBit(64, 128, (2,))
PROBLEMS = [
    *opcheck_problems(),
    *(replace(EMBEDDING, **change) for change in ({"dtype": torch.bfloat16}, {"parameters": torch.bfloat16})),
    *(replace(EMBEDDING, **change) for change in ({"ids": torch.int32}, {"strided": True}, {"scale": 3.0}, {"n": 7})),
    replace(EMBEDDING, dtype=torch.bfloat16).backward,
    replace(EMBEDDING, strided=True).backward,
    *(JointPrompt(s=3, d=12, r=2, **change) for change in ({"dtype": torch.float16}, {"a": 3}, {"activation": "silu"})),
    *(replace(PRODUCT, **change) for change in ({}, {"bias": torch.float32}, {"dtype": torch.bfloat16})),
    *(replace(PRODUCT, **change) for change in ({"strided": True}, {"nested": False}, {"tokens": (40,)})),
    *(replace(PRODUCT, shift=shift, operator="dequantize_4bit") for shift in (0, 1, 4)),
]


def test_a_kept_launch_is_what_triton_would_choose(gpu):
    """Whatever was launched before, with other types, layouts and addresses."""
    calls = [(launcher_of(problem.operator), problem.inputs()) for problem in PROBLEMS]
    expected = []
    for call in calls:
        launch._forget_choices()
        expected.append(gpu.launches(*call))
    assert sum(map(len, expected)) > len(calls)
    launch._forget_choices()
    for _ in range(2):
        for problem, call, launches in zip(PROBLEMS, calls, expected, strict=True):
            assert gpu.launches(*call) == launches, problem.name


def test_triton_looks_at_the_arguments_once_a_shape(gpu):
    launcher, (ids, *rest) = launcher_of("prompted_embedding"), EMBEDDING.inputs()
    for times in range(3):
        before = launch.launches()
        launcher(ids.clone(), *rest)
        assert launch.launches() == before + 2
        assert (gpu.bound, len(gpu.launched)) == (2, 2 * times + 2)


def test_tensors_off_16_bytes_are_bound_anew_at_every_launch(gpu):
    launcher, (ids, *rest) = launcher_of("prompted_embedding"), EMBEDDING.inputs()
    shifted = torch.cat([ids.flatten()[:1], ids.flatten()])[1:].view(ids.shape)
    assert shifted.data_ptr() % 16
    for times in range(3):
        launcher(shifted, *rest)
        assert gpu.bound == times + 2  # `token_at`, which does not read the ids, once
