"""Measures operators or training steps, or checks the device, and appends every result to a record as it is made.

    python -m benchmarks.run kernels --device cpu --output FILE.jsonl                 operators against alternatives
    python -m benchmarks.run steps --device cuda --output FILE.jsonl --seconds 100    as many steps as fit
    python -m benchmarks.run steps --output FILE.jsonl --only everything adapters     units on request

The same command continues an interrupted record. Nothing new begins after `--seconds`. The sections of a GPU's report
(`benchmarks/gpu_report.py`) are suites, too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .record import Record, Row, Work, check_device, command_line, header, is_device_broken, is_finished, measured_with

# By suite, the functions that list its units for a table of cases and a device; the tests list themselves.
SUITES: dict[str, tuple[str, ...]] = {
    "kernels": ("operators:works_of",),
    "environment": ("checks:environment_works",),
    "once": ("checks:once_works",),
    "tests": (),
    "sanitizer": ("checks:sanitizer_works",),
    "ceilings": ("operators:ceiling_works",),
    "goals": ("operators:goal_works",),
    "tune": ("tuning:works_of",),
    "steps": ("steps:works_of",),
    "rest": ("cold:works_of", "operators:rest_works", "steps:rest_works"),
}
MAX_ATTEMPTS = 2  # to measure a unit whose process dies; then that is its result
REHEARSED = "sm_90"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, to test the code: the figures mean nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help=f"compile for {REHEARSED}, run no kernel, measure nothing"
    )
    parser.add_argument("--output", type=Path, required=True, help="the record, JSON lines; continued if it is there")
    parser.add_argument(
        "--as-is", action="store_true", help="append to the record even if its sources or versions differ"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="only units with one of these in their name")
    parser.add_argument("--group", default="", help="the units of one group; of tests, a share such as 3/8")
    parser.add_argument(
        "--seconds", type=float, default=280, help="begin nothing new after this many seconds (default 280)"
    )
    arguments = parser.parse_args()

    # Before importing `ept_kernels`, which then reads this choice: on a GPU the kernels must be asked for.
    if arguments.device == "cuda" or arguments.rehearse:
        os.environ.setdefault("EPT_KERNELS", "triton")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing chooses a GPU by itself
    check_device(arguments.device)
    table = table_of(arguments.device, arguments.reduced, arguments.rehearse)
    chosen = [] if arguments.suite == "tests" else chosen_works(arguments, table, parser)
    output = arguments.output.resolve()
    if arguments.as_is:  # for the report, which has made or checked the record itself
        record = Record(output)
    else:
        command = command_line("-m benchmarks.run", sys.argv[1:])
        record = Record.resume(output, header(command, arguments.device, arguments.reduced, arguments.rehearse))
    about = measured_with(arguments.device, arguments.reduced, arguments.rehearse)
    if arguments.suite == "tests":
        from .device_tests import run_tests

        if not run_tests(record, about, table, arguments.group, tuple(arguments.only or ())):
            raise SystemExit(1)  # to be restarted, because the rest cannot run in this process
        left = 0
    else:
        left = run(record, chosen, about, arguments.seconds, limited=arguments.device == "cuda")
        if left:
            print(f"time is up, {left} of {len(chosen)} left: the same command continues")
    if arguments.as_is and not left:
        with record.unit(complete(arguments.suite, arguments.group)):
            pass


def chosen_works(arguments: argparse.Namespace, table: str, parser: argparse.ArgumentParser) -> list[Work]:
    """Lists the requested units; in a rehearsal they meet a GPU that only compiles."""
    if arguments.rehearse:
        from ept_kernels.dev import compile_only

        compile_only.activate(REHEARSED)
        if arguments.suite == "steps":
            from ept.model import frozen

            # The trials of fused modules compare values, which a kernel that does not run cannot give.
            vars(frozen).update(dict.fromkeys(("computes_the_same", "rotates_the_same"), lambda *_: True))
    works = works_of(arguments.suite, table, arguments.device)
    if not arguments.only:
        return [work for work in works if not work.on_request and arguments.group in ("", work.group)]
    chosen = [work for work in works if any(part in work.unit for part in arguments.only)]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: choose from {', '.join(work.unit for work in works)}")
    return chosen


def table_of(device: str, reduced: bool, rehearse: bool) -> str:
    """Returns the name of the table of cases to measure."""
    if rehearse:
        return "rehearsal"
    return "reduced" if reduced else {"cpu": "cpu", "cuda": "gpu"}[device]


def works_of(suite: str, table: str, device: str) -> list[Work]:
    """Lists the units of a suite; for a file that cannot be imported, one unit that reports it."""
    found: list[Work] = []
    for place in SUITES[suite]:
        module, _, function = place.partition(":")
        try:
            listed: Any = getattr(importlib.import_module(f".{module}", __package__), function)
        except ModuleNotFoundError as error:
            is_ours = str(error.name).partition(".")[0] in ("benchmarks", "ept", "ept_kernels")
            again = functools.partial(importlib.import_module, f".{module}", __package__)  # fails when its turn comes
            found.append(Work(f"{suite}/{module}", again, needs="" if is_ours else str(error.name)))
        else:
            found += listed(table, device)
    return found


def complete(suite: str, group: str = "") -> str:
    """Returns the name of the unit that marks a suite, or a group of it, as complete."""
    return f"complete/{suite} {group}".rstrip()


def run(record: Record, works: Iterable[Work], about: Row, seconds: float, limited: bool = False) -> int:
    """Measures the works that `record` lacks, and returns how many are left when time is up.

    Args:
        about: `measured_with` of the device, added to every row.
        limited: end this process if a unit hangs.
    """
    start = time.monotonic()
    gc.freeze()  # objects loaded so far need not be scanned after every unit
    attempts, ended = record.units()
    left = [work for work in works if not is_finished(ended.get(work.unit))]
    while left and time.monotonic() - start < seconds:
        work = left.pop(0)
        described = {"section": work.unit.partition("/")[0], "case": work.unit, **work.described}
        described = {"status": "ok", "reason": "", "provider": "all", **described, **about}
        refusal: Row = {}
        if attempts[work.unit] >= MAX_ATTEMPTS:
            reason = f"the process ended {MAX_ATTEMPTS} times while measuring it"
            refusal = {"status": "failed", "reason": reason}
        elif missing := [name for name in work.needs.split() if importlib.util.find_spec(name) is None]:
            refusal = {"status": "skipped", "reason": f"{missing[0]} is not installed"}
        began = time.monotonic()
        with record.unit(work.unit, work.limit if limited else None, described) as add:
            if refusal:
                add({**described, **refusal})
                continue
            try:
                rows = work.rows()
                for row in [rows] if isinstance(rows, dict) else rows:
                    add({**described, **row})
                    if "summary" in row:
                        print(f"{row.get('status', 'ok')}: {row['summary']}", flush=True)
                if torch.cuda.is_initialized():  # errors of the last kernels belong to this unit
                    torch.cuda.synchronize()
            except Exception as error:  # a unit that cannot run is a result; the next one is still measured
                add({**described, "status": "failed", "reason": f"{type(error).__name__}: {error}"})
                print(f"failed: {work.unit}: {error}", flush=True)
        if is_device_broken():
            raise SystemExit("the device's context is broken: a new process goes on with the next unit")
        print(f"{time.monotonic() - began:5.1f} s  {work.unit}", flush=True)
        gc.collect()  # the next one may need the device's memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return len(left)


if __name__ == "__main__":
    main()
