"""Checks on this device before anything is measured: its environment, and every operator once.

python -m benchmarks.checks OPERATOR     small odd sizes of one operator, to run under a memory checker
python -m benchmarks.checks              the same for all operators
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ept_kernels.dev import problems
from ept_kernels.dev.problems import FourBit, opcheck_problems
from ept_kernels.dev.tune import refusal
from ept_kernels.library import launcher_of, reference_of
from ept_kernels.problem import Problem

from .processes import environment, run_command
from .record import Row, Work

SANITIZER_SECONDS = 60.0
OPTIONAL = ("bitsandbytes", "datasets", "liger_kernel", "pydantic", "pytest")  # without one, something is skipped
BINARIES = (".cubin", ".hsaco")  # of kernels, in Triton's cache
SMALL = FourBit(64, 128, (), operator="dequantize_4bit")  # its kernel tests the cache


def goal_problems() -> list[Problem]:
    """Lists every operator with kernels, at the sizes in the goals or of a known model."""
    bf16 = torch.bfloat16
    embedding = replace(problems.LLAMA_7B, r=30)
    weight = FourBit(4096, 4096, (), dtype=bf16, operator="dequantize_4bit")
    product = replace(weight, operator="matmul_4bit")
    found: list[Problem] = [embedding, embedding.packed, embedding.backward]
    found += [x for joint in (problems.T5_BASE_JOINT, problems.LLAMA_7B_JOINT) for x in (joint, joint.backward)]
    found += [weight, replace(weight, rows=14336)]
    found += [replace(product, tokens=(tokens,)) for tokens in (1, 16, 32, 64, 2048)]
    found.append(replace(product.backward, tokens=(2048,)))
    named = {problem.operator for problem in found}
    others = (*problems.compiled_problems(), *opcheck_problems())
    first = {problem.operator: problem for problem in reversed(others) if problem.operator not in named}
    return [*found, *first.values()]


def environment_works(table: str, device: str) -> list[Work]:
    """Returns the unit that describes machine and packages, and the one that tests the kernel cache."""
    works = [Work("environment", partial(describe, device))]
    return works if table == "reduced" else [*works, Work("cache", partial(try_cache, device))]


def once_works(table: str, device: str) -> list[Work]:
    """Returns every problem of `goal_problems` as a unit; only those of the same operator share a process."""
    reduced = table == "reduced"
    chosen = opcheck_problems() if reduced else goal_problems()
    compared = table != "rehearsal"
    return [
        Work(f"once/{problem.name}", partial(check, problem, device, compared), group=problem.operator)
        for problem in chosen
    ]


def sanitizer_works(table: str, device: str) -> list[Work]:
    """Returns every operator as a unit: small launches of it under NVIDIA's memory checker."""
    operators = dict.fromkeys(problem.operator for problem in opcheck_problems())
    return [
        Work(
            f"sanitizer/{name}",
            partial(sanitize, name, table, device),
            group=name,
            limit=2 * SANITIZER_SECONDS,
        )
        for name in operators
    ]


def describe(device: str) -> Row:
    """Describes the machine as far as a reader of the record may need, and lists missing packages."""
    row: Row = {
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "tools": [
            name for name in ("compute-sanitizer", "ptxas", "nvcc", "gcc", "clang", "make") if shutil.which(name)
        ],
        "triton_cache": os.environ.get("TRITON_CACHE_DIR", ""),
        "processors": os.cpu_count(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        row |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        row |= {"capability": f"{properties.major}.{properties.minor}", "free_bytes": torch.cuda.mem_get_info()[0]}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        if shutil.which(query[0]):
            row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    missing = f"without {', '.join(row['missing'])}" if row["missing"] else "nothing is missing"
    return {**row, "summary": f"{row['processors']} processors, {missing}"}


def try_cache(device: str) -> Row:
    """Launches one small kernel: if a cache was brought along, it has this kernel, or nothing in it will be found."""
    from triton import knobs

    def kernels() -> int:  # without compiled launchers, which no packed cache contains
        return sum(path.suffix in BINARIES for path in Path(knobs.cache.dir).rglob("*"))

    inputs, before, began = SMALL.inputs(device), kernels(), time.monotonic()
    launcher: Any = launcher_of(SMALL.operator)
    launcher(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, new = time.monotonic() - began, kernels() - before
    said = "the cache had it" if not new else f"compiled: the cache of {before} kernels did not have it"
    return {
        "seconds": seconds,
        "kernels": before,
        "hit": not new,
        "summary": f"first kernel in {seconds:.2f} s, {said}",
    }


def check(problem: Problem, device: str, compared: bool = True) -> Row:
    """Runs the kernels of a problem once (on a CPU the reference) and, if `compared`, checks each result against the
    reference in float64.
    """
    row: Row = {"operator": problem.operator, "sizes": problem.sizes}
    inputs, began = problem.inputs(device), time.monotonic()
    run: Any = launcher_of(problem.operator) if device == "cuda" or not compared else reference_of(problem.operator)
    run(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
        row["first_call_seconds"] = time.monotonic() - began
    if device == "cuda" and (reason := refusal(problem, {}, inputs, problem.expected(*inputs))):
        return {**row, "status": "failed", "reason": reason}
    return row


def sanitize(operator: str, table: str, device: str) -> Row:
    """Returns compute-sanitizer's verdict on reads and writes out of bounds; a rehearsal runs without the tool."""
    command = [sys.executable, "-m", "benchmarks.checks", operator]
    tool = shutil.which("compute-sanitizer")
    if table == "rehearsal":
        command.append("--rehearse")
    elif device != "cuda" or tool is None:
        lacks = "compute-sanitizer is not on the PATH" if device == "cuda" else "compute-sanitizer needs a GPU"
        return {"status": "skipped", "reason": lacks}
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "99", *command]
    # Without PyTorch's cache every tensor is a separate allocation, whose bounds the tool knows.
    variables = environment(EPT_KERNELS="triton", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"tool": "compute-sanitizer memcheck", **run_command(command, variables, SANITIZER_SECONDS)}


def main() -> None:
    arguments = sys.argv[1:]
    rehearsed = "--rehearse" in arguments
    if rehearsed:
        from ept_kernels.dev import compile_only

        compile_only.activate("sm_90")
    device = "cuda" if torch.cuda.is_available() and not rehearsed else "cpu"
    wanted = opcheck_problems()
    if names := [name for name in arguments if not name.startswith("--")]:
        wanted = [problem for problem in wanted if problem.operator in names]
    for problem in wanted:
        if reason := check(problem, device, compared=not rehearsed).get("reason"):
            raise SystemExit(f"{problem.name}: {reason}")
    print(f"{len(wanted)} problems checked on {device}")


if __name__ == "__main__":
    main()
