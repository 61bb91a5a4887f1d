"""Compiles every kernel in every shipped configuration for the supported targets, without a GPU.

    python -m ept_kernels.dev.aot [--json FILE] [--targets NAME,NAME] [--only KERNEL] [--jobs NUMBER]

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
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import launch
from ..launch import REGISTERS, AotCase

# target: (backend, architecture, threads a warp, bytes of shared memory one program may have)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


def cases() -> list[AotCase]:
    """Every kernel of this package with representative signatures, as the heuristics launch it."""
    from ..four_bit import (
        dequantize as dequantize_4bit_triton,
    )
    from ..four_bit import (
        matmul as matmul_4bit_triton,
    )
    from ..four_bit import (
        matmul_backward as matmul_4bit_backward_triton,
    )
    from ..joint_prompt import configs as joint_prompt_configs
    from ..prompted_embedding import configs as prompted_embedding_configs

    return [
        *joint_prompt_configs.aot_cases(),
        *prompted_embedding_configs.aot_cases(),
        *dequantize_4bit_triton.aot_cases(),
        *matmul_4bit_triton.aot_cases(),
        *matmul_4bit_backward_triton.aot_cases(),
    ]


def shipped_cases() -> list[AotCase]:
    """Every kernel in every measured configuration that is shipped under `configs/`.

    Raises:
        ValueError: a file is damaged, or names a kernel and a size that the tuner does not know.
    """
    from .tune import tunables

    known = {(tunable.kernel, tunable.size): tunable for tunable in tunables()}
    found = []
    for path in sorted(launch.CONFIGS.glob("*.json")):
        for kernel, sizes in launch.load_configs(path).items():
            if "." in kernel:  # a measured number, not a kernel
                continue
            for size, config in sizes.items():
                if (kernel, size) not in known:
                    raise ValueError(
                        f"{path} has {kernel} at {size}, which the tuner does not know: remove the entry, or tune anew"
                    )
                tunable = known[kernel, size]
                case = tunable.aot({**tunable.default, **config})
                found.append(case._replace(name=f"{case.name} ({path.stem})"))
    return found


def every_case() -> list[AotCase]:
    """The 4-bit kernels, as the heuristics launch them, for every kind of weight and of operands."""
    from ..four_bit import (
        dequantize as dequantize_4bit_triton,
    )
    from ..four_bit import (
        matmul as matmul_4bit_triton,
    )
    from ..four_bit import (
        matmul_backward as matmul_4bit_backward_triton,
    )

    modules = (dequantize_4bit_triton, matmul_4bit_triton, matmul_4bit_backward_triton)
    return [case for module in modules for case in module.every_aot_case()]


def candidate_cases() -> list[AotCase]:
    """Every kernel in every configuration that the tuner may try, once each."""
    from .tune import tunables

    found: dict[Any, AotCase] = {}
    for tunable in tunables():
        if "." in tunable.kernel:  # a measured number, not a kernel
            continue
        for config in tunable.candidates:
            case = tunable.aot({**tunable.default, **config})
            same = (case.fn, repr(case.constexprs), repr(case.signature), case.num_warps, case.num_stages)
            found.setdefault(same, case._replace(name=f"{case.name} {config}"))
    return list(found.values())


_waiting: list[tuple[AotCase, str]] = []  # what the processes of compile_all inherit: a kernel cannot be sent to them


def compile_all(chosen: Iterable[tuple[AotCase, str]], jobs: int) -> list[dict[str, Any]]:
    """`compile_case` of every case and target, in order, by `jobs` processes forked from this one."""
    _waiting[:] = chosen
    if jobs == 1 or len(_waiting) < 2:
        return [compile_case(*pair) for pair in _waiting]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as processes:
        return list(processes.map(_compile_waiting, range(len(_waiting))))


def _compile_waiting(index: int) -> dict[str, Any]:
    return compile_case(*_waiting[index])


def compile_case(case: AotCase, target: str) -> dict[str, Any]:
    """Compiles `case` for `target`; returns registers, spilled bytes, shared memory (bytes) and instructions.

    Raises whatever Triton raises when the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp, limit = TARGETS[target]
    # As at run time, where Triton sees that the allocator's addresses are multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(case.signature.values()) if t.startswith("*")}
    source = ASTSource(fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=aligned)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    if case.all_registers and backend == "cuda":
        options["maxnreg"] = REGISTERS
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    facts = _amd_facts(compiled.asm["amdgcn"]) if backend == "hip" else _nvidia_facts(compiled.asm["cubin"])
    return {
        "kernel": case.name,
        "target": target,
        **facts,
        # Of a thread, loops counted once, and what stands around them too.
        "per_weight": round(facts["instructions"] * case.num_warps * warp / case.weights, 1) if case.weights else "",
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": limit,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled case; empty when nothing is."""
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


def _nvidia_facts(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        code = _run("nvdisasm", "-c", str(path))
    registers = int(re.findall(r"\bREG:(\d+)", usage)[-1])
    local = int(re.findall(r"\bLOCAL:(\d+)", usage)[-1]) + int(re.findall(r"\bSTACK:(\d+)", usage)[-1])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {
        "registers": registers,
        "spilled_bytes": local if spills else 0,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    }


def _amd_facts(assembly: str) -> dict[str, int]:
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", assembly))
    # Scalar registers spill into lanes of vector registers; only vector spills and scratch go to memory.
    spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    scratch = sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly))
    instructions = len(re.findall(r"^\s+[a-z]+_[a-z0-9_]+\s", assembly, re.MULTILINE))
    return {"registers": registers, "spilled_bytes": max(4 * spilled, scratch), "instructions": instructions}


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--every", action="store_true", help="also every kind of 4-bit weight and of its operands")
    parser.add_argument("--candidates", action="store_true", help="also every configuration that the tuner may try")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiled at a time; all processors")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: under the interpreter nothing is compiled")
    targets = arguments.targets.split(",")

    def compiled(chosen: Iterable[AotCase]) -> list[dict[str, Any]]:
        wanted = [(case, target) for case in chosen if arguments.only in case.name for target in targets]
        return compile_all(wanted, arguments.jobs)

    rows = compiled([*cases(), *shipped_cases(), *(every_case() if arguments.every else ())])
    candidates = compiled(candidate_cases() if arguments.candidates else ())
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
