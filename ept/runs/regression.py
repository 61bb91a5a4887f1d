"""A classifier's head for numbers: it starts at their mean and learns in units of their spread.

A new head gives numbers around 0, and its rate is what its weights move by a step. For prices around 200,000 that would
be no start from which training arrives. In units of the spread every regression is trained alike, and the head still
gives the numbers themselves, whoever loads it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model.base_model import wrapped_heads

UNIT = "unit"  # of a group of parameters: by what its rate is larger than the configuration's


def spread_of(values: Sequence[float]) -> float:
    """Returns the standard deviation of the train rows' numbers; 1 where they are all the same."""
    return statistics.pstdev(values) or 1.0


def last_layer(model: nn.Module) -> nn.Linear | None:
    """Finds the layer of a trained head that gives the number; None where no single one does."""
    trained = (copy for wrapper in wrapped_heads(model) for copy in wrapper.modules_to_save.values())
    found = [m for copy in trained for m in copy.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return found[0] if len(found) == 1 else None


def start_at_mean(model: nn.Module, values: Sequence[float]) -> None:
    """Makes a new head start around the mean of the train rows' numbers, as far from it as they are themselves."""
    if (layer := last_layer(model)) is not None:
        with torch.no_grad():
            layer.weight.mul_(spread_of(values))
            if layer.bias is not None:
                layer.bias.mul_(spread_of(values)).add_(statistics.fmean(values))


def in_units_of(spread: float, layer: nn.Linear, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the parameters of `layer` last, in groups with a rate that is `spread` times that of their group."""
    own = {id(parameter) for parameter in layer.parameters()}
    kept = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    moved = [
        {**group, "params": [p for p in group["params"] if id(p) in own], "lr": group["lr"] * spread, UNIT: spread}
        for group in groups
    ]
    return [group for group in (*kept, *moved) if group["params"]]
