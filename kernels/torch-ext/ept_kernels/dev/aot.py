"""Compiles every kernel in every shipped configuration for the supported targets, without a GPU.

    python -m ept_kernels.dev.aot [--targets NAME,NAME] [--only OPERATOR] [--jobs NUMBER]
    python -m ept_kernels.dev.aot --warm FOLDER --targets NAME [--then COMMAND]
    python -m ept_kernels.dev.aot --unpack FOLDER.tar.xz

The launchers are called as on such a GPU, with the driver of `compile_only.py`; whatever that refuses, such as a spill,
is a failure. Prints registers, shared memory and instructions of each kernel, and instructions per decoded 4-bit
weight. `--candidates` adds everything that the tuner may try, which takes long; refusals among these are printed but
are not failures.

`--warm` packs the compiled kernels, as in Triton's own cache, for a machine with such a GPU; `--unpack` there adds them
to that machine's cache, wherever it is. `docs/kernels.md` lists what determines whether Triton finds a kernel.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from .. import launch
from ..launch import Config, Launch
from ..library import launcher_of
from ..problem import Problem
from .compile_only import TARGETS, Driver, Target, disassembled, driving
from .problems import compiled_problems
from .tunables import tunables

Row = dict[str, Any]

# A packed cache: the file that says under which conditions it is found, and the suffixes kept from Triton's cache.
MADE_WITH = "made_with.json"
PACKED = (".cubin", ".hsaco", ".json")


class Case(NamedTuple):
    """A call of a launcher, with `configs` by kernel instead of the heuristics'; `note` is appended to the names."""

    problem: Problem
    configs: dict[str, Config]
    note: str = ""
    target: str = ""  # the only target it is for, if any


def cases() -> list[Case]:
    """Lists calls that launch every kernel in its heuristic configuration."""
    return [Case(problem, {}) for problem in compiled_problems()]


def shipped_cases() -> Iterator[Case]:
    """Lists a call for every measured configuration shipped under `configs/`, for its target.

    Raises:
        ValueError: a file is damaged, or names a kernel and a size that the tuner does not know.
    """
    known = {(tunable.kernel, tunable.size): tunable for tunable in tunables()}
    for path in sorted(launch.CONFIGS.glob("*.json")):
        target = json.loads(path.read_text(encoding="utf-8")).get("target")
        for kernel, sizes in launch.load_configs(path).items():
            for size, config in sizes.items() if "." not in kernel else ():  # a dot marks other measured numbers
                if (kernel, size) not in known:
                    raise ValueError(
                        f"{path} has {kernel} at {size}, which the tuner does not know: remove the entry, or tune anew"
                    )
                tunable = known[kernel, size]
                yield Case(tunable.problem.small, tunable.trying(config), f" ({path.stem})", target)


def candidate_cases() -> list[Case]:
    """Lists a call for every configuration that the tuner may try."""
    kernels = [tunable for tunable in tunables() if "." not in tunable.kernel]
    return [Case(t.problem.small, t.trying(config), f" {config}") for t in kernels for config in t.candidates]


def compile_all(
    cases: Sequence[Case], targets: Iterable[str], only: str, jobs: int, is_counted: bool = True
) -> tuple[list[Row], list[str]]:
    """Compiles, for all targets, the kernels of cases with `only` in their names, in `jobs` forked processes.

    Returns a row for every distinct kernel, in order, and the refusals. Counting instructions takes a while.
    """
    chosen = [(case, target) for target in targets for case in cases if case.target in ("", target)]
    chosen = [pair for pair in chosen if only in pair[0].problem.name]
    compile_one = functools.partial(compile_case, is_counted=is_counted)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as processes:
        found = list(processes.map(compile_one, *zip(*chosen)))
    rows: dict[str, Row] = {}
    for row in (row for of_case, _ in found for row in of_case):
        rows.setdefault(row["hash"], row)
    return list(rows.values()), [reason for _, reason in found if reason is not None]


def compile_case(case: Case, target: str, is_counted: bool) -> tuple[list[Row], str | None]:
    """Calls the launcher for `target`; returns a row for each launched kernel, and the reason if it failed."""
    launcher: Any = launcher_of(case.problem.operator)
    inputs, reason = case.problem.inputs(), None
    with driving(target) as driver, launch.configured(case.configs), launch.watched() as launches:
        try:
            launcher(*inputs)
        except Exception as error:  # a compiler or the driver may raise anything
            reason = f"{case.problem.name}{case.note} on {target}: {str(error).strip().splitlines()[0]}"
    return [_row(case, target, launched, driver.limits, is_counted) for launched in launches], reason


def _row(case: Case, target: str, launched: Launch, limits: Target, is_counted: bool) -> Row:
    """Describes a compiled kernel: registers per thread, bytes of shared memory, instructions."""
    meta, metadata, weights = launched.meta, launched.compiled.metadata, 0  # weights: number decoded by a program
    if "UNITS" in meta:
        weights = meta["UNITS"] * 2 * meta["BYTES"] * meta["ITERS"]
    elif "OPERAND" in meta:
        weights = meta["BLOCK_N"] * meta["BLOCK_K"]
    name = metadata.name.removesuffix("_kernel")
    of = "" if name == case.problem.operator else f" of {case.problem.operator}"
    count = _instructions(launched.compiled, limits.backend) if is_counted else 0
    return {
        "kernel": f"{name}{of} {case.problem.sizes}{case.note}",
        "target": target,
        "registers": launched.compiled.n_regs,
        "instructions": count,
        # Instructions of a thread, including those outside the loops; loops count once.
        "per_weight": round(count * metadata.num_warps * limits.warp / weights, 1) if weights else "",
        "shared_bytes": metadata.shared,
        "hash": launched.compiled.hash,
    }


@functools.cache
def _instructions(compiled: Any, backend: str) -> int:
    if backend == "hip":
        return len(re.findall(r"^\s+[a-z]+_[a-z0-9_]+\s", compiled.asm["amdgcn"], re.MULTILINE))
    code = disassembled(compiled.kernel, "nvdisasm", "-c")
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))


def fill(folder: Path, target: str, only: str, jobs: int) -> int:
    """Compiles all that `target` may launch, even in the tuner, into a cache in `folder`; counts the kernels."""
    os.environ.update(TRITON_CACHE_DIR=str(folder.absolute()), TRITON_STORE_BINARY_ONLY="1")
    rows, refused = compile_all([*cases(), *shipped_cases(), *candidate_cases()], [target], only, jobs, False)
    print(*refused, sep="\n", flush=True)
    return len(rows)


def made_with(target: str) -> dict[str, str]:
    """Describes the conditions under which a cache for `target` is found on this machine, except the kernels."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before triton 3.5
        from triton.compiler.compiler import triton_key

    backend = make_backend(Driver(target).get_current_target())
    found_by = f"{triton_key()}-{backend.hash()}-{sorted(get_cache_invalidating_env_vars().items())}"
    return {
        "target": target,
        "triton": version("triton"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "found_by": hashlib.sha256(found_by.encode()).hexdigest(),
    }


def pack(folder: Path, target: str) -> Path:
    """Packs the cache in `folder`, filled on this machine, next to it; removes everything but binaries and metadata."""
    for path in folder.glob("*/*"):
        if path.suffix not in PACKED:
            path.unlink()
    (folder / MADE_WITH).write_text(json.dumps(made_with(target)), encoding="utf-8")
    return Path(shutil.make_archive(str(folder), "xztar", folder))


def unpack(archive: Path) -> int:
    """Adds the packed kernels to this machine's cache, `TRITON_CACHE_DIR` if set; returns their number.

    Raises:
        ValueError: `pack` did not make the file, or nothing in it would be found with the versions on this machine.
    """
    from triton.runtime.cache import FileCacheManager

    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder, filter="data")
        about = Path(folder, MADE_WITH)
        made = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        if made.get("target") not in TARGETS:
            raise ValueError(f"{archive} holds no kernels: make it with `python -m ept_kernels.dev.aot --warm`")
        here = made_with(made["target"])
        if made != here:
            theirs, ours = (f"triton {x['triton']} for Python {x['python']}" for x in (made, here))
            other = (
                f"this machine has {ours}"
                if theirs != ours
                else "this machine has another build of it, or other TRITON_ variables"
            )
            raise ValueError(
                f"{archive} was made with {theirs}, but {other}: none of its kernels would be found; make it with "
                "the same"
            )
        kernels = [path for path in Path(folder).iterdir() if path.is_dir()]
        for kernel in kernels:
            cache = FileCacheManager(kernel.name)
            # A group contains its folder's path, so it is written anew.
            files = [path for path in kernel.iterdir() if not path.name.startswith("__grp__")]
            paths = {path.name: cache.put(path.read_bytes(), path.name) for path in files}
            cache.put_group(next(name for name in paths if name.endswith(".json")), paths)
    return len(kernels)


def table(rows: Iterable[Row]) -> str:
    columns = ("kernel", "target", "registers", "shared_bytes", "instructions", "per_weight")
    lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--only", default="", help="calls of operators whose name or sizes contain this")
    parser.add_argument("--candidates", action="store_true", help="also every configuration that the tuner may try")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="kernels compiled at a time; default: one per processor"
    )
    parser.add_argument("--warm", type=Path, metavar="FOLDER", help="fill a kernel cache for one target, and pack it")
    parser.add_argument(
        "--then",
        metavar="COMMAND",
        action="append",
        default=[],
        help="command to run with that cache before it is packed",
    )
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="unpack a packed cache into this machine's")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    if unknown := ", ".join(sorted({*targets} - {*TARGETS})):
        raise SystemExit(f"--targets {unknown}: known are {', '.join(TARGETS)}")
    if arguments.unpack:
        try:
            return print(f"{unpack(arguments.unpack)} kernels are in Triton's cache now")
        except (OSError, ValueError, tarfile.TarError) as error:
            raise SystemExit(str(error)) from error
    if arguments.warm:
        if len(targets) > 1:
            raise SystemExit("--warm is for one target: add --targets sm_90, or another of " + ", ".join(TARGETS))
        count = fill(arguments.warm, targets[0], arguments.only, arguments.jobs)
        failed = [command for command in arguments.then if subprocess.run(shlex.split(command)).returncode]
        archive = pack(arguments.warm, targets[0])
        print(f"{count} compiled for {targets[0]}; {archive} has {archive.stat().st_size / 1e6:.1f} MB")
        sys.exit("\n".join(f"failed, so kernels may be missing: {command}" for command in failed) or 0)

    wanted = targets, arguments.only, arguments.jobs
    rows, refused = compile_all([*cases(), *shipped_cases()], *wanted)
    candidates, passed_over = compile_all(candidate_cases() if arguments.candidates else [], *wanted)
    if not rows and not refused:
        raise SystemExit(f"--only {arguments.only}: no operator's name or sizes contain this")
    print(table([*rows, *candidates]))
    for reason in passed_over:
        print(f"the tuner refuses it: {reason}")
    print(f"{len(rows)} compiled with triton {version('triton')}, {len(refused)} problems")
    sys.exit("\n".join(refused) or 0)


if __name__ == "__main__":
    main()
