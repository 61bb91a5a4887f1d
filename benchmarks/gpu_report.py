"""The report of one GPU, in one command: a plan of timed sections, the most important first.

    python benchmarks/gpu_report.py                            nine minutes on one GPU
    python benchmarks/gpu_report.py --minutes 4                as much of it as fits
    python benchmarks/gpu_report.py --rehearse --output FILE   without a GPU: kernels are compiled, none runs
    python benchmarks/gpu_report.py --device cpu --reduced --output FILE    tiny sizes, to test this code

Every result is written to `benchmarks/results/<device>/report.jsonl` as soon as it is known. The record is valid even
if the run is killed, and the same command continues it with what is missing, for the same card, versions and sources; a
record of others is kept beside the new one. It needs neither network nor the project's own environment: any Python with
torch, triton, transformers, peft and pytest will do. Whatever needs other missing packages is skipped, with the reason
in the record.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels/torch-ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device_tests import MARKED
from benchmarks.processes import Job, environment, run_jobs, start, stop
from benchmarks.record import (
    RECORD_NAME,
    RESULTS,
    Record,
    Row,
    check_device,
    command_line,
    header,
    is_measured,
    measured_with,
)
from benchmarks.run import complete, table_of, works_of
from benchmarks.tables import check_table, everything_text, goal_table, plan_table, reasons, step_table

MINUTES = 9.0
STARTS = 20  # of a section whose process died; every unit can survive two
MEASURED_FROM = "ceilings"  # the first section that the compiler running beside it would disturb
RESERVE = 15.0  # seconds for the start and for the tables at the end


@dataclass(frozen=True)
class Section:
    """A suite of `benchmarks.run` and its share of a plan of `MINUTES`.

    Attributes:
        seconds: its time; whatever a section leaves goes to the next one.
        processes: at a time.
        grouped: every group of units has its own process, so that an illegal access of one operator does not end the
            others; otherwise all units share one, and every process takes a share of the tests.
    """

    suite: str
    seconds: float
    processes: int = 1
    grouped: bool = False

    @property
    def at_once(self) -> int:
        """Returns the number of processes on this machine: no more than processors."""
        return min(self.processes, os.cpu_count() or 1)

    def groups(self, table: str, device: str) -> list[str]:
        if self.grouped and table != "reduced":
            return list(dict.fromkeys(work.group for work in works_of(self.suite, table, device)))
        if self.processes > 1 and not self.grouped:
            shares = [f"{share}/{self.at_once}" for share in range(1, self.at_once + 1)]
            return shares if table == "reduced" else [MARKED, *shares]  # what nothing else can tell comes first
        return [""]


PLAN = (
    Section("environment", 20),  # machine, packages, and whether this host can use the kernel cache
    Section("once", 60, processes=16, grouped=True),  # each operator at the goals' sizes, against float64
    Section("tests", 100, processes=8),
    Section("sanitizer", 45, processes=16, grouped=True),
    Section("ceilings", 15),
    Section("goals", 70),
    Section("tune", 80),
    Section("steps", 90),
    Section("rest", 60),
)


def measure(
    record: Record, plan: Sequence[Section], device: str, options: Sequence[str], table: str, minutes: float
) -> None:
    """Runs the sections of `plan` one after another, each until its time is up, and records the time of each.

    During the checks on a GPU, kernels are compiled in parallel, until something is measured.
    """
    record.forgive()  # units during which an earlier call ran out of time or was killed
    scale = max(60 * minutes - RESERVE, 0.0) / sum(section.seconds for section in plan)
    reduced, rehearsal = "--reduced" in options, table == "rehearsal"
    about = {"section": "plan", "provider": "all", **measured_with(device, reduced, rehearsal)}
    compiler = start([sys.executable, "-m", "benchmarks.tuning"], environment()) if device == "cuda" else None
    due = time.monotonic()
    try:
        for section in plan:
            if compiler is not None and section.suite == MEASURED_FROM:
                stop(compiler)
            due += section.seconds * scale
            ended, began = record.units()[1], time.monotonic()
            groups = [g for g in section.groups(table, device) if complete(section.suite, g) not in ended]
            commands = [_command(record, section.suite, group, device, options, due) for group in groups]
            names = [f"{section.suite} {group}".rstrip() for group in groups]
            jobs = [Job(name, command, STARTS) for name, command in zip(names, commands)]
            left = run_jobs(jobs, section.at_once, due, environment())
            said = f"cut off: {', '.join(left)}" if left else "complete" if jobs else "complete before"
            took, box = time.monotonic() - began, section.seconds * scale
            row: Row = {"seconds": took, "box": box, "left": left, "summary": said, "status": "ok", "reason": ""}
            with record.unit(f"plan/{section.suite}") as add:
                add({"case": f"plan/{section.suite}", **row, **about})
            print(f"== {section.suite}: {took:.0f} s of {box:.0f} s, {said}", flush=True)
    finally:
        if compiler is not None:
            stop(compiler)


def _command(record: Record, suite: str, group: str, device: str, options: Sequence[str], due: float) -> list[str]:
    seconds = max(0.0, due - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.run", suite, "--device", device, "--output", str(record.path)]
    return [*command, "--as-is", "--seconds", f"{seconds:.0f}", *(["--group", group] if group else []), *options]


def summary(results: list[Row]) -> str:
    """Returns plan, checks, steps, missing results and goals. The kernels' table, which is long, is on the page."""
    measures = all(map(is_measured, results))
    parts = [
        "" if measures else "NOTHING IS MEASURED: reduced sizes or a rehearsal, no figure below means anything",
        plan_table(results),
        check_table(results),
        step_table(results),
        everything_text(results),
        "\n".join(f"* {line}" for line in reasons(results)),
        goal_table(results),
    ]
    return "\n\n".join(filter(None, parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"minutes for all sections together (default {MINUTES:g})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes; needed with --device cpu")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: compile for sm_90, run no kernel")
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=[section.suite for section in PLAN])
    parser.add_argument("--output", type=Path, help="the record; default benchmarks/results/<device>/report.jsonl")
    parser.add_argument("--fresh", action="store_true", help="begin a new record instead of continuing the old one")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else arguments.device
    if device == "cpu" and not (arguments.reduced or arguments.rehearse):
        parser.error("--device cpu goes with --reduced; `make bench` measures the CPU subset")
    if (arguments.reduced or arguments.rehearse) and arguments.output is None:
        parser.error(
            "--reduced and --rehearse need --output: their figures mean nothing and must not stand beside real ones"
        )
    check_device(device)
    command = command_line("benchmarks/gpu_report.py", sys.argv[1:])
    head = header(command, device, arguments.reduced, arguments.rehearse)
    folder = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    output = arguments.output or RESULTS / folder / RECORD_NAME
    if arguments.fresh:
        output.unlink(missing_ok=True)
    record = Record.resume(output.resolve(), head)
    options = [f"--{option}" for option in ("reduced", "rehearse") if getattr(arguments, option)]
    table = table_of(device, arguments.reduced, arguments.rehearse)
    plan = [section for section in PLAN if arguments.only is None or section.suite in arguments.only]
    measure(record, plan, device, options, table, arguments.minutes)
    results = record.results()
    print(f"\n{summary(results)}\n\nrecord: {output}")
    return 1 if any(row["status"] == "failed" for row in results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that child processes end too
    sys.exit(main())
