"""The whole layer under `torch.compile` and in CUDA graphs, and what can be known of the latter without a GPU."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from layer_checks import MAX_LENGTH, check_captured, check_compiled, make_ids, make_layer, step
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from waits import Waits

import ept_kernels
from ept import embedding
from ept_kernels import launch, library
from ept_kernels.dev.problems import JointPrompt, PromptedEmbedding
from ept_kernels.problem import as_tuple

CPU = torch.device("cpu")


def test_layer_compiles_as_one_graph_for_all_lengths():
    check_compiled(CPU, "aot_eager", tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU: with g++ installed `make test` runs it"
)
def test_layer_compiles_with_inductor():
    check_compiled(CPU, "inductor", tolerance=1e-5)


def test_unmarked_lengths_are_compiled_until_they_are_seen_to_change():
    """Automatic dynamic shapes: one more compilation for the length, one for the batch, none after that."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(make_layer(), fullgraph=True, backend=counter)
    counts = []
    for batch, n in ((2, 5), (2, 7), (3, 7), (4, 8), (2, 12), (9, 3)):
        compiled(*make_ids(batch=batch, n=n))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 3, 3]


def test_compiled_graph_refuses_a_text_that_is_too_long():
    torch._dynamo.reset()
    compiled = torch.compile(make_layer(), fullgraph=True, backend="eager")
    ids = torch.zeros(2, MAX_LENGTH + 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"more than {MAX_LENGTH} tokens.*truncate to {MAX_LENGTH}"):
        compiled(ids, torch.ones_like(ids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: `make gpu` runs it on one")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "captured"])
def test_layer_compiles_or_is_captured_in_a_cuda_graph_on_a_gpu(backend):
    if backend == "captured":
        check_captured(torch.device("cuda"))
    else:
        check_compiled(torch.device("cuda"), backend, tolerance=1e-5)


# Without a GPU: tensors without data raise wherever a value would be read, leave their device, or decide a shape.


@pytest.mark.parametrize("options", [{}, {"prompt_rank": 2}], ids=["", "a prompt in a frozen basis"])
def test_layer_waits_for_no_value_and_keeps_to_its_device(options, monkeypatch):
    monkeypatch.setattr(embedding, "is_plain_lookup", lambda embedding: True)  # which says no to weights without data
    layer = make_layer(**options).to("meta")
    layer._embedding[0].to("meta")
    ids, mask = (x.to("meta") for x in make_ids())
    with Waits() as waits:
        output, *gradients = step(layer, ids, mask)
    assert waits.found == []
    assert output.shape == (3, 5 + 9, 64)
    assert len(gradients) == len(list(layer.parameters()))
    assert all(x.is_meta for x in (output, *gradients))
    with pytest.raises((RuntimeError, NotImplementedError)):  # what the layer would meet
        output.sum().item()
    with pytest.raises(NotImplementedError):
        output.cpu()


def _arguments(name: str, batch: int = 3, n: int = 9) -> tuple[Any, ...]:
    """Makes arguments of the operator `name`: one small training batch; the parameters are the same for all."""
    problem: Any = PromptedEmbedding(n, batch=batch, m=160, padding="left")
    if name.startswith("joint"):
        problem = JointPrompt(a=4)
    if name == "prompted_embedding_packed":
        ids, _, *others, _ = problem.inputs()
        return ids.flatten(), torch.arange(batch + 1) * n, *others
    return (problem.backward if name.endswith("backward") else problem).inputs()


OPERATORS = [name for name in ept_kernels.__all__ if re.fullmatch("(prompted|joint)_.*(?<!_reference)", name)]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: `make test` runs it where it has wheels (Linux)"
)


def run_without_data(function, name: str, batch: int = 3, n: int = 9) -> list[Tensor]:
    """Calls `function` with the operator's arguments as tensors without data."""
    args = _arguments(name, batch, n)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        return [*as_tuple(function(*args))]


def test_reading_a_value_would_be_found():
    with pytest.raises(DataDependentOutputException):
        run_without_data(lambda ids, *rest: torch.zeros(int(ids.max())), "prompted_embedding")


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_reads_no_value(name):
    reference = getattr(ept_kernels, f"{name}_reference")
    expected = as_tuple(reference(*_arguments(name)))
    for a, e in zip(run_without_data(reference, name), expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


@needs_triton
@pytest.mark.parametrize("name", OPERATORS)
def test_launcher_reads_no_value_and_hands_over_torchs_memory_only(name, monkeypatch):
    launcher = library.launcher_of(name)
    assert launcher is not None, f"{name} has no Triton kernels"
    launched = []

    def record(kernel, grid, *args, **meta):
        launched.append(grid)
        assert all(type(x) is int for x in grid), grid
        for value in tree_leaves((args, meta)):
            assert isinstance(value, FakeTensor) or not hasattr(value, "data_ptr"), (kernel, value)

    monkeypatch.setattr(launch, "launch", record)  # which every prepared launch calls at first
    actual = run_without_data(launcher, name)
    assert launched
    expected = run_without_data(getattr(ept_kernels, name), name)  # the operator's fake
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
