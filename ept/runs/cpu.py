"""Faster training on a CPU: the dtype of the weights, the choice of attention, and reuse of freed memory. Figures are
in docs/profiling.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import torch

# In text tokens; 500 positions with a prompt of 100. Eager attention keeps the weights of every pair of positions.
MAX_EAGER_TEXT = 400

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_NEVER_TRIM, _PAD, _LARGEST = -1, 64 << 20, 1 << 30


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 if `device` multiplies it in hardware, else float32."""
    if device.type == "cpu":
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = False
    return torch.bfloat16 if is_native else torch.float32


def choose_attention(base: Any, max_length: int | None) -> None:
    """Replaces SDPA by eager attention where that is faster: in bfloat16 on a CPU, for short texts.

    There PyTorch's fused attention takes two to seven times as long. In float32 it is faster except for the shortest
    texts.

    Args:
        max_length: tokens of the longest text; None: unknown, nothing is changed.
    """
    is_short = max_length is not None and max_length <= MAX_EAGER_TEXT
    is_bfloat16 = base.device.type == "cpu" and base.dtype == torch.bfloat16
    if is_short and is_bfloat16 and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation("eager")


def keep_freed_memory() -> bool:
    """Makes this process keep memory that tensors free, for reuse; returns whether it does.

    glibc requests blocks above 32 MiB from the kernel one by one and returns them at once, so that every step pays for
    clearing them again. With this, the process stays as large as its largest step. Nothing is gained if the heap cannot
    grow, which is decided at random for each process. Other C libraries, and environments that configure malloc, are
    left alone.
    """
    is_set = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    values = {M_MMAP_THRESHOLD: _LARGEST, M_TRIM_THRESHOLD: _NEVER_TRIM, M_TOP_PAD: _PAD}
    return sum(mallopt(name, value) for name, value in values.items()) == len(values)
