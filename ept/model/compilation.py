"""Regional compilation: the frozen model's repeated layers, each compiled as one region, in place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
from torch import nn

MAX_LENGTHS = 16  # of a batch, each compiled separately
_KINDS_OF_LAYER = 4  # T5's: the first and the others, in encoder and decoder, all one class to the compiler


def compile_layers(model: nn.Module, *, cuda_graphs: bool = False, **options: Any) -> int:
    """Compiles the repeated layers of `model` in place, at their first call; returns their number.

    One compilation serves all layers, whereas compiling the whole model takes time in proportion to its depth.
    Parameter names stay the same, so adapters are saved and loaded as without compilation.

    Args:
        cuda_graphs: records the kernels of a layer, forward and backward, once per shape and replays them as one CUDA
            graph (torch's mode `reduce-overhead`). For training: the next call of `model` overwrites what a layer
            returned, so cached keys and values are lost; generate within `uncompiled`.
        options: of `torch.compile`, such as `backend`. `dynamic` is False by default: every shape is compiled
            separately, so that a step's result does not depend on the shapes before it. torch's limit on such versions
            is raised to what `MAX_LENGTHS` lengths need.

    Raises:
        ValueError: the model has no list of equal layers, or `cuda_graphs` is set and it is not on a CUDA device.
    """
    if cuda_graphs:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ValueError(
                f"cuda_graphs needs a CUDA device, but the model is on {device.type}: set cuda_graphs=false"
            )
        options = {"mode": "reduce-overhead", **options}
    layers = _repeated_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no repeated layers to compile: set compile_layers=false")
    config: Any = torch._dynamo.config
    # Two per length, because the last batch is smaller.
    config.recompile_limit = max(config.recompile_limit, 2 * MAX_LENGTHS * _KINDS_OF_LAYER)
    for layer in layers:
        layer.compile(**{"dynamic": False, **options})
    if cuda_graphs:
        # Every layer is a separate region; without the mark, each could take the previous one for a finished step.
        model.register_forward_pre_hook(lambda module, arguments: torch.compiler.cudagraph_mark_step_begin())
    return len(layers)


def check_lengths(longest: int, multiple: int) -> None:
    """Refuses more batch lengths than are compiled: `longest` tokens in steps of `multiple`."""
    lengths = -(-longest // multiple)
    if lengths > MAX_LENGTHS:
        raise ValueError(
            f"training.pad_to_multiple_of={multiple} makes {lengths} lengths of up to {longest} tokens, but "
            f"training.compile_layers compiles at most {MAX_LENGTHS}: set it to {-(-longest // MAX_LENGTHS)} or more"
        )


def uncompiled() -> AbstractContextManager[Any]:
    """Runs compiled layers as plain PyTorch within the context."""
    return torch.compiler.set_stance("force_eager")


def _repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Collects the members of the outermost lists of equal modules; experts inside a layer belong to that layer."""
    if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1:
        return list(module)
    return [layer for child in module.children() for layer in _repeated_layers(child)]
