"""The report of one GPU, in one command: tests, memory check, kernels against peers, training steps, goals.

    python benchmarks/gpu_report.py                            about eight minutes on one GPU
    python benchmarks/gpu_report.py --device cpu --reduced     tiny sizes on a CPU: tests this code, measures nothing

Every result is appended to `benchmarks/results/<device>/report.jsonl` as it is made. An interrupted report is
continued by the same command; so is one whose time ran out. A record of other sources or versions is kept beside the
new one. Needs no network, nor the project's own environment: any Python that has torch, triton, transformers, peft and
pytest will do, and what is missing beside them is skipped, with the reason in the record.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels/torch-ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checks import call, environment
from benchmarks.record import RECORD_NAME, RESULTS, Record, Row, check_device, command_line, header
from benchmarks.shapes import TABLES
from benchmarks.tables import goal_table, markdown, option_table, reasons, step_table

# Seconds of each suite; what is not reached is measured by the next run of the same command.
BUDGETS = {"checks": 155.0, "kernels": 180.0, "steps": 110.0}
GRACE = 45.0  # of a suite's last unit, which may have begun just in time
TOTAL = 465.0  # of all suites with their graces: with the start and the tables, less than eight minutes
MAX_RESTARTS = 20  # of a suite whose process died, which every unit survives twice


def measure(record: Record, device: str, reduced: bool, scale: float = 1.0) -> None:
    """Runs every suite in a process of its own, begun again where it died, as long as there is time."""
    end = time.monotonic() + TOTAL * scale
    for suite, budget in BUDGETS.items():
        deadline = min(time.monotonic() + budget * scale, end)
        for _ in range(MAX_RESTARTS):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            limit = min(seconds + GRACE, end - time.monotonic())
            command = [sys.executable, "-m", "benchmarks.run", suite, "--device", device, "--output", str(record.path)]
            command += ["--as-is", "--seconds", f"{seconds:.0f}", *(["--reduced"] if reduced else [])]
            code, _ = call(command, environment(), limit)
            if code is None:
                print(f"{suite}: stopped after {limit:.0f} s, in the middle of its last unit", flush=True)
            if not code:
                break
            print(f"{suite}: the process ended with code {code}; going on without what it was at", flush=True)


def summary(results: list[Row], reduced: bool) -> str:
    """Returns checks, steps, what is missing and goals. The kernels' table is long: see the page."""
    checked = [row for row in results if row["section"] in ("tests", "sanitizer")]
    checks = [[row["case"], row["status"], row.get("summary", row["reason"])] for row in checked]
    measured = {row["case"] for row in results if row["section"] == "kernels"}
    parts = [
        "REDUCED: tiny sizes, no figure below means anything" if reduced else "",
        markdown(["check", "status", "result"], checks),
        f"kernels: {len(measured)} of {len(TABLES['reduced' if reduced else 'gpu']())} cases measured",
        step_table(results),
        option_table(results),
        "\n".join(f"* {line}" for line in reasons(results)),
        goal_table(results),
    ]
    return "\n\n".join(filter(None, parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes; needed with --device cpu")
    parser.add_argument("--output", type=Path, help="the record; default benchmarks/results/<device>/report.jsonl")
    parser.add_argument("--fresh", action="store_true", help="begin a new record instead of continuing the old one")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every suite's time")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.reduced:
        parser.error("--device cpu goes with --reduced; `make bench` measures the CPU subset")
    if arguments.reduced and arguments.output is None:
        parser.error("--reduced needs --output: its figures mean nothing and belong beside no real ones")
    check_device(arguments.device)
    head = header(command_line("benchmarks/gpu_report.py", sys.argv[1:]), arguments.device, arguments.reduced)
    folder = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    output = arguments.output or RESULTS / folder / RECORD_NAME
    if arguments.fresh:
        output.unlink(missing_ok=True)
    record = Record.resume(output.resolve(), head)
    measure(record, arguments.device, arguments.reduced, arguments.scale)
    results = record.results()
    print(f"\n{summary(results, arguments.reduced)}\n\nrecord: {output}")
    return 1 if any(row["status"] == "failed" for row in results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended too
    sys.exit(main())
