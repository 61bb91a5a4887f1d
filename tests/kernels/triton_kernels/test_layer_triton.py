"""The operators and the layer on the Triton kernels, under the interpreter: dispatch, launches, gradients, opcheck."""

from __future__ import annotations

import copy

import pytest
import torch

import ept_kernels
from ept import EPTConfig, EPTLayer
from ept_kernels import launch


def make_layer() -> tuple[EPTLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 64).requires_grad_(False)
    layer = EPTLayer(EPTConfig(num_virtual_tokens=5, max_length=12, r=3), embedding)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 2 + [0] * 7])
    return layer, torch.randint(0, 50, (3, 9)), mask


def test_cpu_tensors_go_through_the_kernels_and_float64_does_not():
    assert ept_kernels.backend("cpu") == "triton"
    layer, ids, mask = make_layer()
    before = launch.launches()
    layer(ids, mask)
    assert launch.launches() > before
    before = launch.launches()
    exact = copy.deepcopy(layer).double()
    exact(ids, mask, embedding=torch.nn.Embedding(50, 64, dtype=torch.float64))
    assert launch.launches() == before


def test_embedding_takes_one_launch_forward_and_three_backward():
    layer, ids, mask = make_layer()
    prompt = layer.joint_prompt().detach()
    arguments = (ids, mask.cumsum(1) - 1, layer._embedding[0].weight, prompt, layer.A, layer.B, 0.5)
    before = launch.launches()
    output = ept_kernels.prompted_embedding(*arguments)
    assert launch.launches() - before == 1
    before = launch.launches()
    ept_kernels.prompted_embedding_backward(torch.ones_like(output), arguments[1], layer.A, layer.B, 0.5)
    assert launch.launches() - before == 3


def test_layer_and_its_gradients_equal_the_float64_reference():
    layer, ids, mask = make_layer()
    exact = copy.deepcopy(layer).double()
    embedding = copy.deepcopy(layer._embedding[0]).double()
    weight = torch.randn(3, 14, 64, generator=torch.Generator().manual_seed(1))
    output = layer(ids, mask)[0]
    (output * weight).sum().backward()
    expected = exact(ids, mask, embedding=embedding)[0]
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for (name, parameter), reference in zip(layer.named_parameters(), exact.parameters(), strict=True):
        bound = 1e-5 * float(reference.grad.abs().max())
        difference = float((parameter.grad.double() - reference.grad).abs().max())
        assert difference <= 10 * bound, f"{name}: {difference} where {10 * bound} is allowed"


def test_two_runs_give_equal_bits():
    gradients = []
    for _ in range(2):
        layer, ids, mask = make_layer()
        layer(ids, mask)[0].square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["prompted_embedding", "prompted_embedding_packed", "prompted_embedding_backward"])
def test_opcheck_on_the_kernels(name):
    layer, ids, mask = make_layer()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    prompt, A, B = (x.detach() for x in (layer.prompt, layer.A, layer.B))
    table = layer._embedding[0].weight
    arguments = {
        "prompted_embedding": (ids, positions, table, prompt, A, B, 0.5),
        "prompted_embedding_packed": (ids.flatten(), torch.tensor([0, 9, 18, 27]), table, prompt, A, B, 0.5),
        "prompted_embedding_backward": (torch.randn(3, 14, 64), positions, A, B, 0.5),
    }[name]
    results = torch.library.opcheck(getattr(ept_kernels, name), arguments)
    assert set(results.values()) == {"SUCCESS"}, results
