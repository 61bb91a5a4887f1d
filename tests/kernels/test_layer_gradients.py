"""The whole layer's gradients against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from layer_checks import make_ids, make_layer
from torch.func import functional_call


@pytest.mark.parametrize(
    "options",
    [{}, {"fusion_dim": 0}, {"num_spaces": 1}, {"fusion": False}, {"r": 0}],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "all parts",
)
def test_gradients_of_all_parameters_pass_gradcheck(options):
    layer = make_layer(**options).double()
    embedding = layer._embedding[0].double()
    ids, mask = make_ids()
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(*parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (ids, mask), {"embedding": embedding})[
            0
        ]

    assert output(*values).requires_grad
    assert torch.autograd.gradcheck(output, tuple(x.detach().requires_grad_() for x in values), fast_mode=True)
