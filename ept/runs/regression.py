"""A classifier's head for numbers, whatever they are measured in.

A new head gives numbers around 0, and its rate is what its weights move by a step: from there prices around 200,000 are
never reached. So every regression is learned in units, and from a start, in which its numbers are spread as ratings
from 0 to 5 are. The head still gives the numbers themselves, whoever loads it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model.base_model import wrapped_heads

UNIT = "unit"  # of a group of parameters: by what its rate is larger than the configuration's
# Mean and standard deviation of such ratings, STS-B's. A start at their mean was no better: docs/results/README.md.
MEAN, SPREAD = 2.7, 1.5


def unit_of(values: Sequence[float]) -> float:
    """Returns the unit in which the train rows' numbers have the standard deviation `SPREAD`; 1 for equal numbers."""
    return statistics.pstdev(values) / SPREAD or 1.0


def last_layer(model: nn.Module) -> nn.Linear | None:
    """Finds the layer of a trained head that gives the number; None where no single one does."""
    trained = (copy for wrapper in wrapped_heads(model) for copy in wrapper.modules_to_save.values())
    found = [m for copy in trained for m in copy.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return found[0] if len(found) == 1 else None


def start_below(model: nn.Module, values: Sequence[float]) -> None:
    """Makes a new head start `MEAN` units below the mean of the train rows' numbers, and move in those units."""
    if (layer := last_layer(model)) is not None:
        unit = unit_of(values)
        with torch.no_grad():
            layer.weight.mul_(unit)
            if layer.bias is not None:
                layer.bias.mul_(unit).add_(statistics.fmean(values) - MEAN * unit)


def in_units_of(unit: float, layer: nn.Linear, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the parameters of `layer` last, in groups with a rate that is `unit` times that of their group."""
    own = {id(parameter) for parameter in layer.parameters()}
    kept = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    moved = [
        {**group, "params": [p for p in group["params"] if id(p) in own], "lr": group["lr"] * unit, UNIT: unit}
        for group in groups
    ]
    return [group for group in (*kept, *moved) if group["params"]]
