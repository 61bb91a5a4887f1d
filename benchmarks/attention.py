"""Attention on a CPU: PyTorch's fused attention (SDPA) against transformers' eager one.

Forward and backward, by dtype, kind and length; `ept.runs.cpu` chooses by the result.

One thread, in CPU time, both in turn, with freed memory kept and with glibc's defaults.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from ept.runs.cpu import M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD, keep_freed_memory

from .record import Row
from .timing import Call, ThreadClock, one_thread, ratio, time_in_turn

# Heads, heads of keys and values, width of a head: SmolLM2-135M, T5-base, MiniLM.
KINDS = {"llama": (9, 3, 64), "t5": (12, 12, 64), "bert": (12, 12, 32)}
DTYPES = ("float32", "bfloat16")


def measure(*, batch: int, lengths: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yields a row for every dtype, kind, length and handling of memory; the gain is SDPA's time over eager's."""
    with one_thread():
        for kept, dtype, kind, length in itertools.product((False, True), DTYPES, KINDS, lengths):
            keep_freed_memory() if kept else as_glibc_starts()
            calls = implementations(kind, batch, length, getattr(torch, dtype))
            times = time_in_turn(calls, ThreadClock("cpu", 1), rounds=rounds, warmup=1)
            yield {
                "provider": f"{kind}, {length}, {dtype}{', memory kept' if kept else ''}",
                **times["eager"].as_dict(),
                "sdpa_median": times["sdpa"].median,
                "gain_of_eager": ratio(times["sdpa"], times["eager"]),
                "size": {"batch": batch, "length": length},
                "dtype": dtype,
            }


def implementations(kind: str, batch: int, length: int, dtype: torch.dtype) -> dict[str, Call]:
    """Returns both attentions of padded rows, forward and backward, as the models of a kind call them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.bert import modeling_bert
    from transformers.models.llama import modeling_llama
    from transformers.models.t5 import modeling_t5

    modules = {"llama": modeling_llama, "t5": modeling_t5, "bert": modeling_bert}
    heads, kv_heads, width = KINDS[kind]
    q = torch.randn(batch, heads, length, width).to(dtype).requires_grad_()
    k, v = (torch.randn(batch, kv_heads, length, width).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(batch, length, heads, width).to(dtype)
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool)
    seen[1:, ..., length * 3 // 4 :] = False  # padding
    if kind == "llama":
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
    masks = {"sdpa": seen, "eager": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)}
    bias = {"position_bias": torch.randn(1, heads, length, length).to(dtype)} if kind == "t5" else {}
    module: Any = SimpleNamespace(
        num_key_value_groups=heads // kv_heads, is_causal=kind == "llama", training=False, scaling=width**-0.5
    )

    def call(name: str, attention: Any) -> Call:
        def take(_: int) -> None:
            out, _ = attention(module, q, k, v, masks[name], scaling=module.scaling, dropout=0.0, **bias)
            torch.autograd.grad(out, [q, k, v], grad)

        return take

    functions = {"sdpa": sdpa_attention_forward, "eager": modules[kind].eager_attention_forward}
    return {name: call(name, function) for name, function in functions.items()}


def as_glibc_starts() -> None:
    """Undoes `keep_freed_memory`: restores the values that glibc's malloc reaches by itself, and frees kept memory."""
    libc = ctypes.CDLL(None)
    for name, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20), (M_TOP_PAD, 128 << 10)):
        libc.mallopt(name, value)
    libc.malloc_trim(0)
