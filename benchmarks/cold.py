"""The cost of a new process: compilation without a kernel cache, and the first step with and without one.

TRITON_CACHE_DIR=FOLDER python -m benchmarks.cold joint_prompt | step | layer      one of them, here, as JSON
TRITON_CACHE_DIR=FOLDER python -m benchmarks.cold layer --rehearse      without a GPU: only compiles
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .goals import COLD_START, COMPILING
from .processes import environment
from .record import ROOT, Row, Work
from .shapes import OURS

SECONDS = 120.0


def works_of(table: str, device: str) -> list[Work]:
    """Returns both as units of a record; a rehearsal compiles, too."""
    options = ["--rehearse"] if table == "rehearsal" else []
    found = [Work(COMPILING, lambda: compiling(options), limit=SECONDS)]
    if table == "gpu":
        found.append(Work(COLD_START, lambda: cold_start(options), limit=2 * SECONDS))
    return found if table != "reduced" else []


def compiling(options: list[str]) -> Iterator[Row]:
    """Yields the times of the joint prompt's first calls, and the number of kernels compiled for other shapes."""
    with tempfile.TemporaryDirectory() as cache:
        yield {"provider": OURS, "backend": "triton", **_in_new_process("joint_prompt", cache, options)}


def cold_start(options: list[str]) -> Iterator[Row]:
    """Yields the seconds of a process's first training step with an empty kernel cache, and of the next process's."""
    with tempfile.TemporaryDirectory() as cache:
        for provider in ("empty cache", "warm cache"):
            yield {"provider": provider, **_in_new_process("step", cache, options)}


def _in_new_process(what: str, cache: str, options: list[str]) -> Row:
    command = [sys.executable, "-m", "benchmarks.cold", what, *options]
    variables = environment(TRITON_CACHE_DIR=cache, EPT_KERNELS="triton")
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        said = done.stderr.strip().splitlines()  # empty if a signal ended it
        raise RuntimeError(said[-1] if said else f"the process ended with code {done.returncode}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def joint_prompt(device: str) -> Row:
    """Compiles forward and backward for one shape, then for others with the same width and padded rank."""
    from triton import knobs

    from ept_kernels.dev.problems import T5_BASE_JOINT
    from ept_kernels.library import launcher_of

    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **others: Any) -> None:
        if not cache_hit:
            compiled.append(src.name)

    knobs.compilation.listener = listen

    def run(problem: Any) -> tuple[float, int]:
        compiled.clear()
        calls: list[Any] = [(launcher_of(one.operator), one.inputs(device)) for one in (problem, problem.backward)]
        began = time.perf_counter()
        for launcher, inputs in calls:
            launcher(*inputs)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began, len(compiled)

    seconds, first = run(T5_BASE_JOINT)
    again = [run(replace(T5_BASE_JOINT, s=s, m=m, r=r))[1] for s, m, r in ((100, 512, 30), (7, 63, 20), (41, 257, 31))]
    return {"compile_seconds": seconds, "compiled": first, "compiled_again": sum(again)}


def step(device: str) -> Row:
    """Takes the first training step of this process, not counting imports and building the model."""
    from ept.profile.batches import make_batches, random_rows
    from ept.profile.clock import take_step
    from ept.profile.methods import MethodSpec, make_method
    from ept.profile.shapes import build_shape

    there, task_type, size = torch.device(device), "SEQ_2_SEQ_LM", {"batch": 8, "length": 256}
    base = build_shape("t5-base", dtype=torch.bfloat16, device=there)
    method = make_method(MethodSpec.parse("ept"), base, task_type, size["length"])
    method.enter(base)
    rows = random_rows(size["batch"], task_type, base.config.vocab_size, size["length"], varied=False, seed=0)
    how: dict[str, Any] = {
        "padding": "none",
        "width": 1,
        "all_logits": False,
        "pad_token_id": 0,
        "task_type": task_type,
    }
    (inputs,) = make_batches(rows, batch=size["batch"], count=1, device=there, **how)
    torch.accelerator.synchronize()
    began = time.perf_counter()
    take_step(method, inputs)
    torch.accelerator.synchronize()
    return {
        "median": time.perf_counter() - began,
        "size": size,
        "model": "T5-base shape, random weights",
        "dtype": "bfloat16",
    }


def layer(device: str) -> Row:
    """Takes the first forward and backward of a T5-base's EPT layer alone, without any time of the model itself."""
    from ept import EPTConfig, EPTLayer

    config = EPTConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=40, max_length=256, r=30)
    ept_layer = EPTLayer(config, torch.nn.Embedding(32128, 768, device=device))
    ids = torch.ones(8, 256, dtype=torch.long, device=device)
    began, cpu = time.perf_counter(), sum(os.times()[:4])  # includes the assembler, which is a separate process
    ept_layer(ids, torch.ones_like(ids))[0].sum().backward()
    if device != "cpu":
        torch.accelerator.synchronize()
    return {"median": time.perf_counter() - began, "cpu_seconds": sum(os.times()[:4]) - cpu}


def main() -> None:
    if "--rehearse" in sys.argv:
        from ept_kernels.dev import compile_only

        compile_only.activate("sm_90")
    device = "cuda" if torch.cuda.is_available() and "--rehearse" not in sys.argv else "cpu"
    print(json.dumps({"joint_prompt": joint_prompt, "step": step, "layer": layer}[sys.argv[1]](device)))


if __name__ == "__main__":
    main()
