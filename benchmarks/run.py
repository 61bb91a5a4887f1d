"""Measures operators or training steps, or checks the device, and appends every result to a record as it is made.

    python -m benchmarks.run kernels --device cpu --output FILE.jsonl                 operators against their peers
    python -m benchmarks.run steps --device cuda --output FILE.jsonl --seconds 100    as many steps as fit
    python -m benchmarks.run steps --output FILE.jsonl --only options adapters        units on request

The same command continues a record where it was. It begins nothing new after `--seconds`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .record import Record, check_device, command_line, header, measured_with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("checks", "kernels", "steps"))
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
    if arguments.suite == "checks":
        from .checks import works_of
    elif arguments.suite == "kernels":
        from .operators import works_of
    else:
        from .steps import works_of
    from .work import run

    table = "reduced" if arguments.reduced else {"cpu": "cpu", "cuda": "gpu"}[arguments.device]
    works = works_of(table, arguments.device)
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


if __name__ == "__main__":
    main()
