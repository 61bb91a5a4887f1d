"""Launchers of the frozen model's element-wise kernels, one launch each, and their choices."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import Config, Kinds, Prepared, Size
from ..library import check_shapes
from .activation import gated_activation_backward_kernel, gated_activation_kernel, relu_backward_kernel, relu_kernel
from .norm import rms_norm_backward_kernel, rms_norm_kernel
from .reference import (
    ACTIVATION,
    ACTIVATIONS,
    FORMS,
    NORM,
    NORM_BACKWARD,
    ROTARY,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from .rotary import rotary_kernel

# Meta-parameters by kernel, used without a measurement. TILE: minimum elements of a program, in whole rows.
# BLOCK_H: heads of a program.
CONFIGS: dict[str, Config] = {
    "rms_norm": {"TILE": 2048, "num_warps": 4, "num_stages": 1},
    "rms_norm_backward": {"TILE": 2048, "num_warps": 4, "num_stages": 1},
    "rotary": {"BLOCK_H": 16, "num_warps": 4, "num_stages": 1},
    "gated_activation": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "gated_activation_backward": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "relu": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
    "relu_backward": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
}
FLAT = {
    "gated_activation": gated_activation_kernel,
    "gated_activation_backward": gated_activation_backward_kernel,
    "relu": relu_kernel,
    "relu_backward": relu_backward_kernel,
}
ROW_OF_FEW_WARPS = 2048  # columns of a row that `num_warps` share; the number of warps doubles with each doubling
MAX_WIDTH = 2**14  # of a row that a program holds at once; a wider one spills in the backward


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6, form: str = "llama"
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.rms_norm_reference`."""
    if x.shape[-1] > MAX_WIDTH:
        return rms_norm_reference(x, weight, residual, eps, form)
    tensors = x.contiguous(), None if residual is None else residual.contiguous(), weight.contiguous()
    out = x.new_empty(x.shape, dtype=weight.dtype if form == "t5" else x.dtype)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    run = _rms_norm(launch.kinds(*tensors), float(eps), form)
    with launch.on_device(x):
        run(*tensors, out, total, rstd)
    return out, total, rstd


@launch.cached_choice
def _rms_norm(kinds: Kinds, eps: float, form: str) -> Prepared:
    shape, residual, weight = kinds[3]
    check_shapes(NORM, x=shape, weight=weight, residual=residual)
    grid, sizes, options = _rows("rms_norm", shape, kinds[1][0], kinds[2])
    offset, rounds_first = FORMS[form]
    options = {"OFFSET": offset, "ROUNDS_FIRST": rounds_first, **options}
    return Prepared(rms_norm_kernel, grid, (eps, *sizes), options, kinds)


def rms_norm_backward(
    grad_output: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, grad_h: Tensor | None = None, form: str = "llama"
) -> Tensor:
    """Computes `ept_kernels.rms_norm_backward_reference`."""
    if h.shape[-1] > MAX_WIDTH:
        return rms_norm_backward_reference(grad_output, h, weight, rstd, grad_h, form)
    tensors = [x.contiguous() for x in (grad_output, h, weight, rstd)]
    grad_h = None if grad_h is None else grad_h.contiguous()
    out = h.new_empty(h.shape)
    run = _rms_norm_backward(launch.kinds(*tensors, grad_h), form)
    with launch.on_device(h):
        run(*tensors, grad_h, out)
    return out


@launch.cached_choice
def _rms_norm_backward(kinds: Kinds, form: str) -> Prepared:
    grad, shape, weight, rstd, grad_h = kinds[3]
    check_shapes(NORM_BACKWARD, grad_output=grad, h=shape, weight=weight, rstd=rstd, grad_h=grad_h)
    grid, sizes, options = _rows("rms_norm_backward", shape, kinds[1][1], kinds[2])
    return Prepared(rms_norm_backward_kernel, grid, sizes, {"OFFSET": FORMS[form][0], **options}, kinds)


def _rows(kernel: str, shape: Size, dtype: torch.dtype, device: torch.device) -> tuple[Size, Size, dict[str, Any]]:
    """Chooses the number of rows per program."""
    *lead, d = shape
    config = _chosen(kernel, d, dtype, device)
    width, rows = triton.next_power_of_2(max(d, 1)), math.prod(lead)
    block = max(1, config.pop("TILE") // width)
    return (triton.cdiv(rows, block),), (rows, d), {"BLOCK_ROWS": block, "BLOCK_D": width, **config}


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.rotary_reference`."""
    batch, heads, n, width = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    tensors = q, k, cos.contiguous(), sin.contiguous()
    out_q, out_k = q.new_empty(batch, n, heads, width), k.new_empty(batch, n, k.shape[1], width)
    run = _rotary(launch.kinds(*tensors), (*q.stride()[:3], *k.stride()[:3]), interleaved, backward)
    with launch.on_device(q):
        run(*tensors, out_q, out_k)
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


@launch.cached_choice
def _rotary(kinds: Kinds, strides: Size, interleaved: bool, backward: bool) -> Prepared:
    (batch, q_heads, n, width), k, cos, sin = kinds[3]
    check_shapes(ROTARY, q=kinds[3][0], k=k, cos=cos, sin=sin)
    k_heads, shared, columns = k[1], cos[0] == 1, cos[-1]
    angles = f"{1 if shared else batch} {n} {2 * (min(columns, width) // 2)}"
    check_shapes(f"cos {angles}, sin {angles}", cos=cos, sin=sin)
    config = _chosen("rotary", width, kinds[1][0], kinds[2])
    blocks = triton.cdiv(q_heads, config["BLOCK_H"]) + triton.cdiv(k_heads, config["BLOCK_H"])
    options = {
        "SHARED": shared,
        "INTERLEAVED": interleaved,
        "BACKWARD": backward,
        "HALF": columns // 2,
        "BLOCK_C": triton.next_power_of_2(max(columns // 2, 1)),
        "BLOCK_REST": triton.next_power_of_2(width - columns) if width > columns else 0,
        **config,
    }
    return Prepared(rotary_kernel, (batch * n, blocks), (n, q_heads, k_heads, width, *strides), options, kinds)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Computes `ept_kernels.gated_activation_reference`."""
    out = gate.new_empty(gate.shape)
    _launch_flat("gated_activation", (gate, up), (out,), activation)
    return out


def gated_activation_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.gated_activation_backward_reference`."""
    grads = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch_flat("gated_activation_backward", (grad_output, gate, up), grads, activation)
    return grads


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.relu_reference`."""
    results = x.new_empty(x.shape), x.new_empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8)
    _launch_flat("relu", (x,), results)
    return results


def relu_backward(grad_output: Tensor, passes: Tensor) -> Tensor:
    """Computes `ept_kernels.relu_backward_reference`."""
    out = grad_output.new_empty(grad_output.shape)
    _launch_flat("relu_backward", (grad_output, passes), (out,))
    return out


def _launch_flat(
    name: str, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...], activation: str | None = None
) -> None:
    first, tensors = inputs[0], [x.contiguous() for x in inputs]
    run = _flat(launch.kinds(*tensors), name, activation)
    with launch.on_device(first):
        run(*tensors, *results)


@launch.cached_choice
def _flat(kinds: Kinds, name: str, activation: str | None) -> Prepared:
    first, *others = kinds[3]
    elements = math.prod(first)
    if name == "relu_backward":
        check_shapes(f"passes {triton.cdiv(elements, 8)}", passes=others[0])
    else:
        check_shapes(ACTIVATION, grad_output=first, **dict(zip(("up", "gate"), reversed(others))))
    options: dict[str, Any] = {**_chosen(name, 1, kinds[1][0], kinds[2])}
    if activation is not None:
        ACTIVATIONS[activation]  # refuses an unknown one
        options["ACTIVATION"] = activation
    return Prepared(FLAT[name], (triton.cdiv(elements, options["BLOCK"]),), (elements,), options, kinds)


def _chosen(kernel: str, size: int, dtype: torch.dtype, device: torch.device) -> Config:
    return launch.config_for(launch.key(kernel, dtype), max(size, 1), device, heuristic(kernel, size, device))


def heuristic(kernel: str, size: int, device: torch.device) -> Config:
    """Chooses meta-parameters of `kernel` without a measurement; `size` is the width of a norm's rows."""
    config = dict(CONFIGS[kernel])
    if "TILE" in config:
        # A program has at most 1,024 threads; AMD's warps have 64.
        most = 16 if launch.architecture(device) in ("gfx942", "hip") else 32
        config["num_warps"] = min(most, config["num_warps"] * max(1, launch.padded(size) // ROW_OF_FEW_WARPS))
    return config
