"""Measures kernels against their peers and appends every case to a record as it is done.

    python -m benchmarks.run_kernels --device cpu --output FILE.jsonl                    the CPU subset
    python -m benchmarks.run_kernels --device cuda --output FILE.jsonl --seconds 200     as many cases as fit

A run continues the record where it was. It stops beginning new cases after `--seconds`.
"""

from __future__ import annotations

import argparse
import sys
import time

from .record import Record, command_line, measured_with, open_record, table_of
from .shapes import TABLES, Case

CASE_SECONDS = {"gpu": 0.03, "cpu": 0.15, "reduced": 0.01}  # timing of one version of one case


def unit_name(case: Case) -> str:
    return f"kernels/{case.id}"


def run(record: Record, device: str, table: str, seconds: float) -> int:
    """Measures the cases of `table` that `record` lacks, and returns how many are left when time is up."""
    import gc

    import torch

    from . import ceilings
    from .operators import measure_case

    start = time.monotonic()
    left = [case for case in TABLES[table]() if not record.finished(unit_name(case))]
    if not left:
        return 0
    about = measured_with(device, table == "reduced")
    with record.unit("ceilings") as unit:
        measured, rows = ceilings.measure(table, device)
        for row in rows:
            unit.add({"section": "ceilings", "status": "ok", **row, **about})
    while left and time.monotonic() - start < seconds:
        case = left.pop(0)
        name = unit_name(case)
        described = {"section": "kernels", "case": case.id, "kernel": case.kernel, "provider": "all", **about}
        if record.give_up(name, described):
            continue
        with record.unit(name) as unit:
            began = time.monotonic()
            for row in measure_case(case, device, CASE_SECONDS[table], measured, compile_allowed=table != "reduced"):
                unit.add({**row, **about})
        print(f"{time.monotonic() - began:5.1f} s  {case.id}", flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return len(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line(parser, seconds=280)
    arguments = parser.parse_args()
    record = open_record(arguments, "benchmarks.run_kernels")
    left = run(record, arguments.device, table_of(arguments), arguments.seconds)
    if left:
        print(f"time is up, {left} cases left: the same command continues")
    return 0


if __name__ == "__main__":
    sys.exit(main())
