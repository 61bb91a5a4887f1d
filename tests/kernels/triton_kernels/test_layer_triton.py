"""The operators and the whole layer on the Triton kernels: dispatch, launches, gradients, opcheck, graphs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import launches_of
from layer_checks import (
    BY_TOKEN,
    TRANSPOSED,
    assert_same,
    check_compiled,
    check_transposed,
    make_ids,
    make_layer,
    step,
)

import ept_kernels
from ept import functional
from ept_kernels import launch
from ept_kernels.dev.problems import PromptedEmbedding

pytestmark = pytest.mark.usefixtures("large_blocks")


def test_tensors_go_through_the_kernels_and_float64_does_not(device):
    assert ept_kernels.backend(device) == "triton"
    layer, batch = make_layer(device), make_ids(device)
    assert launches_of(layer, *batch) > 0
    exact = partial(layer.double(), embedding=copy.deepcopy(layer._embedding[0]).double())
    assert launches_of(exact, *batch) == 1  # the table of positions: integers whatever the layer's type


def test_autocast_does_not_reach_into_the_launchers(device):
    layer, batch = make_layer(device), make_ids(device)
    expected = layer(*batch)[0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(layer(*batch)[0], expected)


EMBEDDING = PromptedEmbedding(n=9)


@pytest.mark.parametrize(
    "problem, launches",
    [(EMBEDDING, 2), (EMBEDDING.packed, 1), (EMBEDDING.backward, 3), (BY_TOKEN, 1), (BY_TOKEN.backward, 3)],
    ids=lambda x: getattr(x, "operator", str(x)),
)
def test_operators_launch_as_often_as_promised_and_pass_opcheck(problem, launches, device):
    operator, inputs = getattr(ept_kernels, problem.operator), problem.inputs(device)
    assert launches_of(operator, *inputs) == launches
    results = torch.library.opcheck(operator, inputs)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("problem", TRANSPOSED, ids=lambda problem: problem.operator)
def test_transposed_parameters_pass_opcheck(problem, device):
    check_transposed(problem, device)


@pytest.mark.parametrize("update, launches", [("position", (6, 7)), ("token", (5, 8))])
def test_number_of_launches_of_the_layer(update, launches, device):
    """The joint prompt's four and five, and the embedding's: the table of positions is made once."""
    layer, batch = make_layer(device, update=update), make_ids(device)
    before = launch.launches()
    output = layer(*batch)[0]
    between = launch.launches()
    output.sum().backward()
    assert (between - before, launch.launches() - between) == launches


@pytest.mark.parametrize(
    "options",
    [{}, {"fusion_dim": 0}, {"num_spaces": 1}, {"num_spaces": 0}, {"fusion": False}, {"r": 0}, {"update": "token"}],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "all parts",
)
def test_layer_and_its_gradients_equal_float64_autograd_of_the_references(options, device, monkeypatch):
    """PyTorch differentiates what is compared with: no backward of ours is in it."""
    layer, batch = make_layer(device, **options), make_ids(device)
    exact = copy.deepcopy(layer).double()
    exact._embedding[0].double()
    before = launch.launches()
    actual = [x.double() for x in step(layer, *batch)]
    launched = launch.launches()
    assert launched > before
    for name in ("joint_prompt", "prompted_embedding"):
        monkeypatch.setattr(functional, name, getattr(ept_kernels, f"{name}_reference"))
    by_token = ept_kernels.prompted_embedding_by_token_reference
    monkeypatch.setattr(functional, "prompted_embedding_by_token", lambda *inputs, scale: by_token(*inputs, scale)[0])
    assert_same(actual, step(exact, *batch), tolerance=1e-5)
    assert launch.launches() == launched


@pytest.mark.parametrize("update", ["position", "token"])
def test_two_runs_give_equal_bits(update, device):
    runs = [step(make_layer(device, update=update), *make_ids(device)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("update", ["position", "token"])
def test_layer_compiles_as_one_graph_for_all_lengths(update, device):
    check_compiled(device, "aot_eager", tolerance=1e-6, update=update)
