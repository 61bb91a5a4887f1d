"""Compiles every kernel in every shipped configuration for the supported targets, without a GPU.

    python -m ept_kernels.dev.aot [--json FILE] [--targets NAME,NAME] [--only KERNEL] [--jobs NUMBER]
    python -m ept_kernels.dev.aot --warm FOLDER --targets NAME [--then COMMAND]

Prints a table (kernel, target, registers, spilled bytes, shared memory, instructions, and instructions a weight where
4-bit weights are decoded) and fails on any spill, and on shared memory over the target's limit.

`--every` adds every kind of 4-bit weight and of its operands, `--candidates` every configuration that the tuner may
try. Both take long. What is wrong with a candidate is printed and is no failure: the tuner refuses such ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import launch
from ..launch import Config
from ..library import launcher_of
from . import warm
from .compile_only import ARCHITECTURES, TARGETS, disassembled, driving, facts_of
from .problems import Problem, compiled_problems, every_four_bit_problem
from .tune import Tunable, tunables


class Case(NamedTuple):
    """One kernel as a launcher launches it, its tensors replaced by their types."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def form(self) -> Any:
        """Tells apart what Triton compiles for: types, constants, and of integers whether they are 1 or divisible by
        16, unless the kernel asks not to be specialised for them.
        """
        args = [
            type(x)
            if type(x) is float or (type(x) is int and parameter.do_not_specialize)
            else (x == 1, x % 16 == 0)
            if type(x) is int
            else x
            for x, parameter in zip(self.args, self.kernel.params)
        ]
        return self.kernel, *args, *sorted(self.meta.items(), key=lambda item: item[0])


def record(problem: Problem, architecture: str, configs: dict[str, Config] | None = None, note: str = "") -> list[Case]:
    """Calls the launcher of `problem`'s operator on CPU tensors and returns what it would launch on `architecture`.

    `configs` are configurations by kernel in place of the heuristics'; `note` is put behind the names.
    """
    launcher = launcher_of(problem.operator)
    assert launcher is not None, f"{problem.operator} has no kernels"
    inputs = problem.inputs()
    with launch.recording(architecture) as launched, launch.configured(configs or {}):
        launcher(*inputs)
    found = []
    for kernel, grid, args, meta in launched:
        name = kernel.fn.__name__.removesuffix("_kernel")
        of = "" if name == problem.operator else f" of {problem.operator}"
        types = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in args)
        found.append(Case(f"{name}{of} {problem.sizes}{note}", kernel, grid, types, meta))
    return found


def cases(architecture: str, every: bool = False) -> list[Case]:
    """Lists every kernel as the launchers launch it in the heuristics' configurations, each form once."""
    found = [case for problem in compiled_problems() for case in record(problem, architecture)]
    for problem in every_four_bit_problem() if every else ():
        # With a bias the sum is not split: then the kernel itself adds it, and writes the result.
        unsplit = {f"{problem.operator}/{tile}/16-bit": {"SPLITS": 1} for tile in (16, 32, 64)} if problem.bias else {}
        found += record(problem, architecture, unsplit)
    return _distinct(found)


def shipped_cases(architecture: str) -> list[Case]:
    """Lists every kernel in every measured configuration that is shipped under `configs/`.

    Raises:
        ValueError: a file is damaged, or names a kernel and a size that the tuner does not know.
    """
    known = {(tunable.kernel, tunable.size): tunable for tunable in tunables()}
    found = []
    for path in sorted(launch.CONFIGS.glob("*.json")):
        for kernel, sizes in launch.load_configs(path).items():
            for size, config in sizes.items() if "." not in kernel else ():  # with a dot: a measured number
                if (kernel, size) not in known:
                    raise ValueError(
                        f"{path} has {kernel} at {size}, which the tuner does not know: remove the entry, or tune anew"
                    )
                found += _recorded(known[kernel, size], architecture, config, f" ({path.stem})")
    return _distinct(found)


def candidate_cases(architecture: str) -> list[Case]:
    """Lists every kernel in every configuration that the tuner may try, each form once."""
    kernels = [tunable for tunable in tunables() if "." not in tunable.kernel]  # with a dot: a measured number
    tried = ((tunable, config) for tunable in kernels for config in tunable.candidates)
    return _distinct([case for t, config in tried for case in _recorded(t, architecture, config, f" {config}")])


def _recorded(tunable: Tunable, architecture: str, config: Config, note: str) -> list[Case]:
    configs = {**tunable.held, tunable.kernel: {**tunable.default, **config}}
    return record(tunable.problem.small, architecture, configs, note)


def _distinct(found: list[Case]) -> list[Case]:
    first: dict[Any, Case] = {}
    for case in found:
        first.setdefault(case.form, case)
    return list(first.values())


_waiting: list[tuple[Case, str]] = []  # what the processes of compile_all inherit: a kernel cannot be sent to them


def compile_all(chosen: Iterable[tuple[Case, str]], jobs: int) -> list[dict[str, Any]]:
    """Compiles every case for its target, in order, in `jobs` processes forked from this one."""
    _waiting[:] = chosen
    if jobs == 1 or len(_waiting) < 2:
        return [compile_case(*pair) for pair in _waiting]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as processes:
        return list(processes.map(_compile_waiting, range(len(_waiting))))


def _compile_waiting(index: int) -> dict[str, Any]:
    return compile_case(*_waiting[index])


def fill(folder: Path, target: str, only: str, jobs: int) -> int:
    """Compiles whatever may be launched on `target`, the tuner's candidates included, into a kernel cache in `folder`,
    and returns how many kernels those are.
    """
    os.environ.update(TRITON_CACHE_DIR=str(folder.absolute()), TRITON_STORE_BINARY_ONLY="1")
    lists = (cases, shipped_cases, candidate_cases)
    found = [case for cases_of in lists for case in cases_of(ARCHITECTURES[TARGETS[target].backend])]
    _waiting[:] = [(case, target) for case in _distinct(found) if only in case.name]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as processes:
        return sum(processes.map(_is_compiled, range(len(_waiting))))


def _is_compiled(index: int) -> bool:
    case, target = _waiting[index]
    try:
        with driving(target):
            case.kernel.warmup(*case.args, grid=case.grid, **case.meta)
    except Exception as error:  # of a candidate: the tuner refuses it
        print(f"{case.name}: {str(error).strip().splitlines()[0]}", flush=True)
        return False
    return True


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Compiles `case` for `target`; returns registers, spilled bytes, shared memory (bytes) and instructions.

    Triton's own just-in-time compiler does it, which sees the types, constants and divisible numbers that it would see
    at a launch. Raises whatever it raises.
    """
    with driving(target) as driver:
        compiled = case.kernel.warmup(*case.args, grid=case.grid, **case.meta)
    backend, _, warp, limit = driver.limits
    facts = {**facts_of(compiled.kernel, backend), "instructions": _instructions(compiled.asm, backend)}
    warps, meta, weights = compiled.metadata.num_warps, case.meta, 0  # weights: those that a program decodes
    if "UNITS" in meta:
        weights = meta["UNITS"] * 2 * meta["BYTES"] * meta["ITERS"]
    elif "OPERAND" in meta:
        weights = meta["BLOCK_N"] * meta["BLOCK_K"]
    return {
        "kernel": case.name,
        "target": target,
        **facts,
        # Of a thread, loops counted once, and what stands around them too.
        "per_weight": round(facts["instructions"] * warps * warp / weights, 1) if weights else "",
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": limit,
        "num_warps": warps,
        "num_stages": compiled.metadata.num_stages,
    }


def problems(row: dict[str, Any]) -> list[str]:
    """Lists what is wrong with a compiled case."""
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['kernel']} spills {row['spilled_bytes']} bytes on {row['target']}")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(
            f"{row['kernel']} takes {row['shared_bytes']} bytes of shared memory on {row['target']}, the limit is "
            f"{row['shared_limit']}"
        )
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    columns = ("kernel", "target", "registers", "spilled_bytes", "shared_bytes", "instructions", "per_weight")
    lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _instructions(asm: Any, backend: str) -> int:
    if backend == "hip":
        return len(re.findall(r"^\s+[a-z]+_[a-z0-9_]+\s", asm["amdgcn"], re.MULTILINE))
    code = disassembled(asm["cubin"], "nvdisasm", "-c")
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--every", action="store_true", help="also every kind of 4-bit weight and of its operands")
    parser.add_argument("--candidates", action="store_true", help="also every configuration that the tuner may try")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiled at a time; all processors")
    parser.add_argument("--warm", type=Path, metavar="FOLDER", help="fill a kernel cache for one target, and pack it")
    parser.add_argument(
        "--then", metavar="COMMAND", action="append", default=[], help="run with that cache before it is packed"
    )
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="put a packed cache into this machine's")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    if unknown := ", ".join(sorted({*targets} - {*TARGETS})):
        raise SystemExit(f"--targets {unknown}: known are {', '.join(TARGETS)}")
    if arguments.unpack:
        try:
            return print(f"{warm.unpack(arguments.unpack)} kernels are in Triton's cache now")
        except (OSError, ValueError, tarfile.TarError) as error:
            raise SystemExit(str(error)) from error
    if arguments.warm:
        if len(targets) > 1:
            raise SystemExit("--warm is for one target: add --target sm_90, or another of " + ", ".join(TARGETS))
        count = fill(arguments.warm, targets[0], arguments.only, arguments.jobs)
        failed = [command for command in arguments.then if subprocess.run(shlex.split(command)).returncode]
        archive = warm.pack(arguments.warm, targets[0])
        print(f"{count} compiled for {targets[0]}; {archive} has {archive.stat().st_size / 1e6:.1f} MB")
        sys.exit("\n".join(f"failed, so that kernels may be missing: {command}" for command in failed) or 0)

    def compiled(cases_of: Callable[[str], list[Case]]) -> list[dict[str, Any]]:
        # Launchers choose alike for all targets of one backend.
        by_backend = {backend: cases_of(ARCHITECTURES[backend]) for backend in {TARGETS[t].backend for t in targets}}
        wanted = [(case, t) for t in targets for case in by_backend[TARGETS[t].backend] if arguments.only in case.name]
        return compile_all(wanted, arguments.jobs)

    rows = compiled(lambda architecture: [*cases(architecture, arguments.every), *shipped_cases(architecture)])
    candidates = compiled(candidate_cases) if arguments.candidates else []
    if not rows and not candidates:
        raise SystemExit(f"--only {arguments.only}: no kernel's name contains this")
    print(table([*rows, *candidates]))
    for refused in [problem for row in candidates for problem in problems(row)]:
        print(f"the tuner refuses it: {refused}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    found = [problem for row in rows for problem in problems(row)]
    print(f"{len(rows)} compiled with triton {version('triton')}, {len(found)} problems")
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
