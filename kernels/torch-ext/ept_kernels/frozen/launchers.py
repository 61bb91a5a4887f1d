"""Launchers of the frozen model's element-wise kernels, one launch each, and their choices."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import Config, cached_choice, config_for, key, launch, on_device
from .activation import gated_activation_backward_kernel, gated_activation_kernel, relu_backward_kernel, relu_kernel
from .norm import rms_norm_backward_kernel, rms_norm_kernel
from .reference import FORMS, rms_norm_backward_reference, rms_norm_reference
from .rotary import rotary_kernel

# Meta-parameters by kernel, used where nothing was measured. TILE: elements that a program takes at least, of whole
# rows. BLOCK_H: heads that a program takes.
CONFIGS: dict[str, Config] = {
    "rms_norm": {"TILE": 2048, "num_warps": 4, "num_stages": 1},
    "rms_norm_backward": {"TILE": 2048, "num_warps": 4, "num_stages": 1},
    "rotary": {"BLOCK_H": 16, "num_warps": 4, "num_stages": 1},
    "gated_activation": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "gated_activation_backward": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "relu": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
    "relu_backward": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
}
WIDE = 4096  # from this width on a row is shared by twice as many warps for each doubling
MAX_WIDTH = 2**14  # of a row that a program holds at once; a wider one spills in the backward


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6, form: str = "llama"
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.rms_norm_reference`."""
    d = x.shape[-1]
    if d > MAX_WIDTH:
        return rms_norm_reference(x, weight, residual, eps, form)
    offset, rounds_first = FORMS[form]
    out = x.new_empty(x.shape, dtype=weight.dtype if form == "t5" else x.dtype)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    options = _row_options("rms_norm", d, x.dtype, x.device)
    with on_device(x):
        launch(
            rms_norm_kernel,
            (triton.cdiv(rstd.numel(), options["BLOCK_ROWS"]),),
            *(x.contiguous(), None if residual is None else residual.contiguous(), weight.contiguous()),
            *(out, total, rstd, float(eps), rstd.numel(), d),
            OFFSET=offset,
            ROUNDS_FIRST=rounds_first,
            **options,
        )
    return out, total, rstd


def rms_norm_backward(
    grad_output: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, grad_h: Tensor | None = None, form: str = "llama"
) -> Tensor:
    """Computes `ept_kernels.rms_norm_backward_reference`."""
    d = h.shape[-1]
    if d > MAX_WIDTH:
        return rms_norm_backward_reference(grad_output, h, weight, rstd, grad_h, form)
    out = h.new_empty(h.shape)
    options = _row_options("rms_norm_backward", d, h.dtype, h.device)
    tensors = grad_output, h, weight, rstd, grad_h
    with on_device(h):
        launch(
            rms_norm_backward_kernel,
            (triton.cdiv(rstd.numel(), options["BLOCK_ROWS"]),),
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            *(out, rstd.numel(), d),
            OFFSET=FORMS[form][0],
            **options,
        )
    return out


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.rotary_reference`."""
    batch, q_heads, n, width = q.shape
    k_heads, half = k.shape[1], cos.shape[-1] // 2
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out_q, out_k = (x.new_empty(batch, n, x.shape[1], width) for x in (q, k))
    config = _chosen("rotary", width, q.dtype, q.device)
    blocks = triton.cdiv(q_heads, config["BLOCK_H"]) + triton.cdiv(k_heads, config["BLOCK_H"])
    with on_device(q):
        launch(
            rotary_kernel,
            (batch * n, blocks),
            *(q, k, cos.contiguous(), sin.contiguous(), out_q, out_k, n, q_heads, k_heads, width),
            *(*q.stride()[:3], *k.stride()[:3]),
            SHARED=cos.shape[0] == 1,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            HALF=half,
            BLOCK_C=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0,
            **config,
        )
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Computes `ept_kernels.gated_activation_reference`."""
    out = gate.new_empty(gate.shape)
    _launch_flat("gated_activation", gated_activation_kernel, (gate, up), (out,), ACTIVATION=activation)
    return out


def gated_activation_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.gated_activation_backward_reference`."""
    grads = gate.new_empty(gate.shape), up.new_empty(up.shape)
    inputs = (grad_output, gate, up)
    _launch_flat("gated_activation_backward", gated_activation_backward_kernel, inputs, grads, ACTIVATION=activation)
    return grads


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.relu_reference`."""
    results = x.new_empty(x.shape), x.new_empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8)
    _launch_flat("relu", relu_kernel, (x,), results)
    return results


def relu_backward(grad_output: Tensor, passes: Tensor) -> Tensor:
    """Computes `ept_kernels.relu_backward_reference`."""
    out = grad_output.new_empty(grad_output.shape)
    _launch_flat("relu_backward", relu_backward_kernel, (grad_output, passes), (out,))
    return out


def _launch_flat(name: str, kernel: Any, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...], **meta: Any) -> None:
    first = inputs[0]
    config = _chosen(name, 1, first.dtype, first.device)
    with on_device(first):
        launch(
            kernel,
            (triton.cdiv(first.numel(), config["BLOCK"]),),
            *(x.contiguous() for x in inputs),
            *results,
            first.numel(),
            **meta,
            **config,
        )


@cached_choice
def _row_options(kernel: str, d: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Chooses how many rows a program takes, and the warps that share them."""
    config = dict(_chosen(kernel, d, dtype, device))
    width = triton.next_power_of_2(max(d, 1))
    rows = max(1, config.pop("TILE") // width)
    config["num_warps"] = min(32, config["num_warps"] * max(1, 2 * width // WIDE))
    return {"BLOCK_ROWS": rows, "BLOCK_D": width, **config}


@cached_choice
def _chosen(kernel: str, size: int, dtype: torch.dtype, device: torch.device) -> Config:
    return config_for(key(kernel, dtype), max(size, 1), device, CONFIGS[kernel])
