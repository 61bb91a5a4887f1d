"""Measures operators or training steps, or checks the device, and appends every result to a record as it is made.

    python -m benchmarks.run kernels --device cpu --output FILE.jsonl                 operators against their peers
    python -m benchmarks.run steps --device cuda --output FILE.jsonl --seconds 100    as many steps as fit
    python -m benchmarks.run steps --output FILE.jsonl --only options adapters        units on request

The same command continues a record where it was. It begins nothing new after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .record import Record, Row, Work, check_device, command_line, header, measured_with

SUITES = {"checks": "checks", "kernels": "operators", "steps": "steps"}  # by name, the module that has its `works_of`
MAX_ATTEMPTS = 2  # to measure a unit whose process dies; then that is its result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, to test the code: the figures mean nothing")
    parser.add_argument("--output", type=Path, required=True, help="the record, JSON lines; continued if it is there")
    parser.add_argument("--as-is", action="store_true", help="append to the record whatever it was measured with")
    parser.add_argument("--only", nargs="+", metavar="PART", help="what has one of these in its name")
    parser.add_argument("--seconds", type=float, default=280, help="begin nothing new after so many (default 280)")
    arguments = parser.parse_args()

    # Before `ept_kernels` is imported, which reads the choice then: on a GPU the kernels have to be asked for.
    if arguments.device == "cuda":
        os.environ.setdefault("EPT_KERNELS", "triton")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing chooses a GPU by itself
    check_device(arguments.device)
    table = "reduced" if arguments.reduced else {"cpu": "cpu", "cuda": "gpu"}[arguments.device]
    suite = importlib.import_module(f".{SUITES[arguments.suite]}", __package__)
    works: list[Work] = suite.works_of(table, arguments.device)
    if arguments.only:
        chosen = [work for work in works if any(part in work.unit for part in arguments.only)]
        if not chosen:
            parser.error(f"--only {' '.join(arguments.only)}: choose from {', '.join(work.unit for work in works)}")
    else:
        chosen = [work for work in works if not work.on_request]
    output = arguments.output.resolve()
    if arguments.as_is:  # for the report, which has made or checked the record itself
        record = Record(output)
    else:
        command = command_line("-m benchmarks.run", sys.argv[1:])
        record = Record.resume(output, header(command, arguments.device, arguments.reduced))
    left = run(record, chosen, measured_with(arguments.device, arguments.reduced), arguments.seconds)
    if left:
        print(f"time is up, {left} of {len(chosen)} left: the same command continues")


def run(record: Record, works: Iterable[Work], about: Row, seconds: float) -> int:
    """Measures the works that `record` lacks, and returns how many are left when time is up.

    Args:
        about: `measured_with` of the device, which every row gets.
    """
    start = time.monotonic()
    gc.freeze()  # what is loaded by now need not be looked through after every unit
    left = [work for work in works if not record.finished(work.unit)]
    while left and time.monotonic() - start < seconds:
        work = left.pop(0)
        described = {"section": work.unit.partition("/")[0], "case": work.unit, **work.described}
        described = {"status": "ok", "reason": "", "provider": "all", **described, **about}
        refusal: Row = {}
        if record.attempts(work.unit) >= MAX_ATTEMPTS:
            reason = f"the process ended {MAX_ATTEMPTS} times while measuring it"
            refusal = {"status": "failed", "reason": reason}
        elif work.needs and importlib.util.find_spec(work.needs) is None:
            refusal = {"status": "skipped", "reason": f"{work.needs} is not installed"}
        began = time.monotonic()
        with record.unit(work.unit) as add:
            if refusal:
                add({**described, **refusal})
                continue
            try:
                for row in work.rows():
                    add({**described, **row})
                    if "summary" in row:
                        print(f"{row['status']}: {row['summary']}", flush=True)
            except Exception as error:  # what cannot run is a result; the next one is still measured
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # raises where the device's context is broken: then this process must end
                add({**described, "status": "failed", "reason": f"{type(error).__name__}: {error}"})
                print(f"failed: {work.unit}: {error}", flush=True)
        print(f"{time.monotonic() - began:5.1f} s  {work.unit}", flush=True)
        gc.collect()  # the next one may need the device's memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return len(left)


if __name__ == "__main__":
    main()
