"""A classifier's regression head, for numbers of any scale.

A new head outputs numbers around 0, and its learning rate is what its weights move per step: from there, prices around
200,000 are never reached. So every regression is learned in units, and from a start, in which its numbers are spread as
ratings from 0 to 5 are. The loaded head still outputs the numbers themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model.base_model import wrapped_heads

UNIT = "unit"  # key of a parameter group: factor on the configured learning rate
# Mean and standard deviation of STS-B's ratings. Starting at their mean was no better: docs/results/README.md.
MEAN, SPREAD = 2.7, 1.5


def unit_of(values: Sequence[float]) -> float:
    """Returns the unit in which the train rows' numbers have standard deviation `SPREAD`; 1 if all are equal."""
    return statistics.pstdev(values) / SPREAD or 1.0


def last_layer(model: nn.Module) -> nn.Linear | None:
    """Finds the layer of a trained head that outputs the number; None unless there is exactly one."""
    trained = (copy for wrapper in wrapped_heads(model) for copy in wrapper.modules_to_save.values())
    found = [m for copy in trained for m in copy.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return found[0] if len(found) == 1 else None


def start_below(model: nn.Module, values: Sequence[float]) -> None:
    """Makes a new head start `MEAN` units below the mean of the train rows' numbers, with weights in that unit."""
    if (layer := last_layer(model)) is not None:
        unit = unit_of(values)
        with torch.no_grad():
            layer.weight.mul_(unit)
            if layer.bias is not None:
                layer.bias.mul_(unit).add_(statistics.fmean(values) - MEAN * unit)


def in_units_of(unit: float, layer: nn.Linear, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moves the parameters of `layer` to separate groups at the end, with `unit` times the learning rate."""
    own = {id(parameter) for parameter in layer.parameters()}
    kept = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    moved = [
        {**group, "params": [p for p in group["params"] if id(p) in own], "lr": group["lr"] * unit, UNIT: unit}
        for group in groups
    ]
    return [group for group in (*kept, *moved) if group["params"]]
