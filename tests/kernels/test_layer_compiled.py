"""The whole layer under `torch.compile` and in CUDA graphs, and what can be known of the latter without a GPU."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch
from layer_checks import MAX_LENGTH, check_captured, check_compiled, make_ids, make_layer, step
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import ept_kernels
from ept import embedding
from ept_kernels import library

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
def test_layer_is_captured_in_a_cuda_graph():
    check_captured(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: `make gpu` runs it on one")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_compiles_on_a_gpu(backend):
    check_compiled(torch.device("cuda"), backend, tolerance=1e-5)


# Without a GPU: tensors without data raise wherever a value would be read, leave their device, or decide a shape.


def test_layer_waits_for_no_value_and_keeps_to_its_device(monkeypatch):
    monkeypatch.setattr(embedding, "is_plain_lookup", lambda embedding: True)  # which says no to weights without data
    layer = make_layer().to("meta")
    layer._embedding[0].to("meta")
    ids, mask = (x.to("meta") for x in make_ids())
    output, *gradients = step(layer, ids, mask)
    assert output.shape == (3, 5 + 9, 64)
    assert len(gradients) == len(list(layer.parameters()))
    assert all(x.is_meta for x in (output, *gradients))
    with pytest.raises((RuntimeError, NotImplementedError)):  # what the layer would meet
        output.sum().item()
    with pytest.raises(NotImplementedError):
        output.cpu()


def _arguments(name: str, batch: int = 3, n: int = 9) -> tuple[object, ...]:
    """Makes arguments of the operator `name`: one small training batch."""
    layer = make_layer().requires_grad_(False)
    ids, mask = make_ids(batch=batch, n=n)
    cu_seqlens = torch.arange(batch + 1) * n
    positions = embedding.text_positions(mask)
    table, (p, A, B) = layer._embedding[0].weight, (layer.prompt, layer.A, layer.B)
    parts = [p, A, B, layer.beta, layer.W_q, layer.W_k, layer.D, layer.U, layer.G]
    options = (1.3, 0.7, 0.5, "gelu")
    return {
        "prompted_embedding": (ids, positions, table, p, A, B, 0.5),
        "prompted_embedding_packed": (ids.flatten(), cu_seqlens, table, p, A, B, 0.5),
        "prompted_embedding_backward": (torch.randn(batch, 5 + n, 64), positions, A, B, 0.5),
        "joint_prompt": (*parts, *options),
        "joint_prompt_backward": (torch.randn(5, 64), *parts, *options),
    }[name]


OPERATORS = [
    "prompted_embedding",
    "prompted_embedding_packed",
    "prompted_embedding_backward",
    "joint_prompt",
    "joint_prompt_backward",
]


def run_without_data(function, name: str, batch: int = 3, n: int = 9) -> list[Tensor]:
    """Calls `function` with the operator's arguments as tensors without data."""
    args = _arguments(name, batch, n)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        result = function(*args)
        return [result] if isinstance(result, Tensor) else list(result)


def test_reading_a_value_would_be_found():
    with pytest.raises(DataDependentOutputException):
        run_without_data(lambda ids, *rest: torch.zeros(int(ids.max())), "prompted_embedding")


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_reads_no_value(name):
    reference = getattr(ept_kernels, f"{name}_reference")
    expected = reference(*_arguments(name))
    actual = run_without_data(reference, name)
    for a, e in zip(actual, [expected] if isinstance(expected, Tensor) else expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: `make test` runs it where it has wheels (Linux)"
)
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

    monkeypatch.setitem(launcher.__globals__, "launch", record)
    actual = run_without_data(launcher, name)
    assert launched
    expected = run_without_data(getattr(ept_kernels, name), name)  # the operator's fake
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def _specialisation(kernel, args: tuple[object, ...], meta: dict[str, object]) -> tuple[object, ...]:
    """Lists what Triton compiles anew for: constants, dtypes, and whether whole numbers are 1 or multiples of 16."""
    found = []
    for parameter, value in zip(kernel.params, [*args, *meta.values()], strict=False):
        if isinstance(value, Tensor):
            found.append(value.dtype)
        elif isinstance(value, int) and not parameter.is_constexpr:
            found.append("any" if parameter.do_not_specialize else (value == 1, value % 16 == 0, value < 2**31))
        elif isinstance(value, float):
            found.append(float)
        else:
            found.append(value)
    return kernel, *found, tuple(sorted((key, str(value)) for key, value in meta.items()))


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: `make test` runs it where it has wheels (Linux)"
)
@pytest.mark.parametrize("name", OPERATORS)
def test_another_batch_or_length_compiles_no_kernel_anew(name, monkeypatch):
    launcher, seen = library.launcher_of(name), []
    monkeypatch.setitem(
        launcher.__globals__,
        "launch",
        lambda kernel, grid, *args, **meta: seen[-1].append(_specialisation(kernel, args, meta)),
    )
    for batch, n in ((3, 9), (1, 9), (16, 9), (3, 1), (3, 16), (3, 33), (2, 160)):
        seen.append([])
        run_without_data(launcher, name, batch, n)
        assert seen[-1] == seen[0], f"{name} is compiled anew for {batch} texts of {n} tokens"
    assert seen[0]
