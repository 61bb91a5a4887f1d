"""Rows and records in the form of benchmarks and `ept profile`, not measured."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import Case
from ept.profile.clock import PHASES

SHARES = (0.01, 0.01, 0.4, 0.5, 0.02, 0.06)  # of the phases of a step
MACHINE = {"hardware": {"processor": "none", "threads": 1, "cores": 1, "gpus": []}, "versions": {"torch": "0"}}


def spread(median: float) -> dict[str, Any]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}


def profiled(*methods: tuple[str, int, float], **other: Any) -> dict[str, Any]:
    """Makes a record of methods, each a name, a number of virtual tokens and the milliseconds of a step."""
    model = {"name": "llama-3.2-1b (random weights)", "class": "T5", "layers": 12, "dtype": "bfloat16"}
    return {
        "model": {**model, "quantization": None},
        "data": {"padding": "max_length", "text_tokens_a_batch": 650.5, "padded_tokens_a_batch": 1024},
        "batch": 32,
        "length": 1024,
        "device": "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "steps": 20,
        "reference": "pt",
        "peak_memory_kind": "none",
        "methods": [
            {
                "label": name,
                "method": name,
                "num_virtual_tokens": tokens,
                "trainable_parameters": 76_800,
                "tokens_per_second": 1e3,
                "peak_memory_bytes": tokens << 20,
                "step_ms": {**spread(time), "samples": [time]},
                "phases_ms": {phase: time * share for phase, share in zip(PHASES, SHARES)},
                "phases_over_step": 1.0,
                "speedup": spread(2.0),
            }
            for name, tokens, time in methods
        ],
        **MACHINE,
        **other,
    }


def kernel_row(case: Case, provider: str, median: float, moved: int, **other: Any) -> dict[str, Any]:
    """Makes a row of an operator that has moved so many bytes."""
    about = {name: getattr(case, name) for name in ("kernel", "size", "dtype", "scheme")}
    found = {"section": "kernels", "status": "ok", "backend": "triton", "median": float(median), "bytes": moved}
    return {"case": case.id, **about, "provider": provider, **found, **other}
