"""The whole layer under `torch.compile` and in CUDA graphs, and what can be tested of the latter without a GPU."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_checks import MAX_LENGTH, check_captured, check_compiled, make_ids, make_layer, step
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves
from waits import Waits

from ept import embedding
from ept_kernels import launch, library
from ept_kernels.dev.problems import opcheck_problems
from ept_kernels.problem import as_tuple

CPU = torch.device("cpu")


@pytest.mark.parametrize("update", ["position", "token"])
def test_layer_compiles_as_one_graph_for_all_lengths(update):
    check_compiled(CPU, "aot_eager", tolerance=1e-6, update=update)


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


@pytest.mark.parametrize(
    "options",
    [{}, {"prompt_rank": 2}, {"update": "token"}],
    ids=["", "a prompt in a frozen basis", "a token-dependent update"],
)
def test_layer_waits_for_no_value_and_keeps_to_its_device(options, monkeypatch):
    monkeypatch.setattr(embedding, "is_plain_lookup", lambda embedding: True)  # which says no to weights without data
    layer = make_layer(**options).to("meta")
    layer._embedding[0].to("meta")
    ids, mask = (x.to("meta") for x in make_ids(n=MAX_LENGTH))
    with Waits() as waits:
        output, *gradients = step(layer, ids, mask)
    assert waits.found == []
    assert output.shape == (3, 5 + MAX_LENGTH, 64)
    assert len(gradients) == len(list(layer.parameters()))
    assert all(x.is_meta for x in (output, *gradients))
    with pytest.raises((RuntimeError, NotImplementedError)):  # what the layer would meet
        output.sum().item()
    with pytest.raises(NotImplementedError):
        output.cpu()


PROBLEMS = [problem for problem in opcheck_problems() if not problem.strided]


@pytest.fixture
def meta(monkeypatch):
    """Has problems drawn and launchers called on the meta device, which stands for a GPU: nothing has a value."""
    for name in ("rand", "randint", "randn", "randperm"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, generator=None, draw=draw, **how: draw(*size, **how))
    generator = SimpleNamespace(device=torch.device("meta"), manual_seed=lambda seed: generator)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator)
    monkeypatch.setattr(launch, "on_device", lambda tensor: nullcontext())
    monkeypatch.setattr(launch, "_measured", lambda path: {})
    monkeypatch.setattr(launch, "config_file", lambda device: None)
    with launch.acting_as(90):
        yield torch.device("meta")


def laid_out(result) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.stride()) for x in as_tuple(result)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_operators_read_no_value_and_keep_to_the_device_of_their_inputs(problem, meta, monkeypatch):
    """Inputs, the right results, references, fakes, and what launchers hand over and return."""

    def is_there(values) -> bool:
        return all(x.is_meta for x in tree_leaves(values) if isinstance(x, Tensor))

    inputs, reference = problem.inputs(meta), library.reference_of(problem.operator)
    expected = laid_out(reference(*inputs))
    assert is_there(inputs)
    assert is_there(reference(*inputs))
    assert is_there(problem.expected(*inputs))
    assert laid_out(getattr(torch.ops.ept, problem.operator).default(*inputs)) == expected
    if find_spec("triton") is not None and (launcher := library.launcher_of(problem.operator)) is not None:
        launched = []

        def record(kernel, grid, *args, **meta):
            launched.append(all(type(size) is int for size in grid) and is_there((args, meta)))

        monkeypatch.setattr(launch, "launch", record)  # which every prepared launch calls at first
        monkeypatch.setattr(launch, "_compile", lambda calls: None)
        result = launcher(*inputs)
        assert is_there(result)
        assert laid_out(result) == expected
        assert launched
        assert all(launched)


def test_reading_a_value_would_be_found(meta):
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(PROBLEMS[0].inputs(meta)[0].max())
