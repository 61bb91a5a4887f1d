"""The report of one GPU, in one command: tests, ceilings, kernels against peers, memory check, training steps, goals.

    python benchmarks/gpu_report.py                            about eight minutes on one GPU
    python benchmarks/gpu_report.py --device cpu --reduced     tiny sizes on a CPU: tests this code, measures nothing

Every result is appended to `benchmarks/results/<device>/report.jsonl` as it is made. An interrupted report is
continued by the same command; so is one whose time ran out. A record of other sources or versions is kept beside the
new one. Needs no network, nor the project's own environment: any Python that has torch, triton, transformers, peft and
pytest will do, and what is missing beside them is skipped, with the reason in the record.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels/torch-ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    RECORD_NAME,
    ROOT,
    Record,
    Row,
    check_device,
    command_line,
    device_folder,
    device_name,
    header,
    measured_with,
)
from benchmarks.shapes import TABLES
from benchmarks.tables import goal_table, markdown, option_table, reasons, step_table

CHECKS = ("tests", "sanitizer")

# Seconds of each section; what is not reached is measured by the next run of the same command.
BUDGETS = {"tests": 130.0, "kernels": 180.0, "sanitizer": 25.0, "steps": 110.0}
GRACE = 45.0  # of a section's last unit, which may have begun just in time
TOTAL = 465.0  # of all sections with their graces: with the start and the tables, less than eight minutes
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal a process gets when its parent ends
RESTARTS = 20  # of a section whose process died, which every unit survives twice


class SuiteRun(NamedTuple):
    """One pytest run."""

    unit: str
    arguments: tuple[str, ...]


TESTS = {
    "cuda": (
        SuiteRun("tests/kernels on the GPU", ("tests/kernels/triton_kernels",)),
        SuiteRun("tests/marked gpu", ("-m", "gpu")),
    ),
    "cpu": (SuiteRun("tests/reduced", ("tests/benchmarks/test_bench_counts.py",)),),
}


class Report:
    """The sections of a report, each appending to one record."""

    def __init__(self, device: str, reduced: bool, output: Path, scale: float = 1.0) -> None:
        self.device, self.reduced, self.scale = device, reduced, scale
        command = command_line("benchmarks/gpu_report.py", sys.argv[1:])
        self.record = Record.resume(output, header(command, device, reduced))
        self.about = measured_with(device, reduced)
        self.end = time.monotonic() + TOTAL * scale

    def run(self) -> None:
        self.tests()
        self.worker("kernels")
        self.sanitizer()
        self.worker("steps")

    def tests(self) -> None:
        """Every kernel against its reference on this device."""
        deadline = time.monotonic() + BUDGETS["tests"] * self.scale
        timed_out = {row["case"] for row in self.record.results() if row.get("timed_out")}
        for run in TESTS[self.device]:
            if self.record.finished(run.unit) and run.unit not in timed_out:
                continue
            with self.record.unit(run.unit) as add:
                row = _pytest(run, self.device, max(10.0 * self.scale, deadline - time.monotonic()))
                add({"section": "tests", "case": run.unit, **row, **self.about})
            print(f"{row['status']:8} {run.unit}: {row.get('summary', row['reason'])}", flush=True)

    def worker(self, section: str) -> None:
        """A section in a process of its own, begun again where it died, as long as there is time."""
        deadline = min(time.monotonic() + BUDGETS[section] * self.scale, self.end)
        for _ in range(RESTARTS):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return
            limit = min(seconds + GRACE, self.end - time.monotonic())
            command = ["benchmarks.run", section, "--device", self.device, "--output", str(self.record.path)]
            command += ["--as-is", "--seconds", f"{seconds:.0f}", *(["--reduced"] if self.reduced else [])]
            code, _ = _call([sys.executable, "-m", *command], _environment(), limit, capture=False)
            if code is None:
                print(f"{section}: stopped after {limit:.0f} s, in the middle of its last unit", flush=True)
            if not code:
                return
            print(f"{section}: the process ended with code {code}; going on without what it was at", flush=True)

    def sanitizer(self) -> None:
        """Reads and writes out of bounds in the 4-bit dequantisation, by NVIDIA's compute-sanitizer where it is."""
        name = "sanitizer/dequantize_4bit"
        if self.record.finished(name):
            return
        with self.record.unit(name) as add:
            row = self._sanitize()
            add({"section": "sanitizer", "case": name, **row, **self.about})
        print(f"{row['status']:8} {name}: {row['reason'] or row['tool']}", flush=True)

    def _sanitize(self) -> Row:
        tool = shutil.which("compute-sanitizer")
        if self.device != "cuda":
            return {"status": "skipped", "reason": "compute-sanitizer needs a GPU"}
        if tool is None:
            return {"status": "skipped", "reason": "compute-sanitizer is not on the PATH"}
        command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable]
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds the tool knows.
        environment = _environment(EPT_KERNELS="triton", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return {
            "tool": "compute-sanitizer memcheck",
            **_run([*command, "-m", "benchmarks.sanitized"], environment, BUDGETS["sanitizer"] * self.scale),
        }


def _pytest(run: SuiteRun, device: str, seconds: float) -> Row:
    environment = _environment(**({"EPT_KERNELS": "triton"} if device == "cuda" else {}))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *run.arguments]
        row = _run(command, environment, seconds)
        if report.exists():
            row.update(_junit_counts(report))
    return row


def _junit_counts(report: Path) -> Row:
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = counts["failures"] + counts["errors"]
    return {**counts, "summary": f"{passed} passed, {failed} failed, {counts['skipped']} skipped"}


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> Row:
    """Return `status` and `reason` of a command that should end with code 0 in time; its last lines if it did not."""
    began = time.monotonic()
    code, output = _call(command, environment, seconds, capture=True)
    took = time.monotonic() - began
    if code is None:
        return {"status": "failed", "reason": f"not finished after {seconds:.0f} s", "timed_out": True, "seconds": took}
    if code == 0:
        return {"status": "ok", "reason": "", "seconds": took}
    lines = "\n".join(output.strip().splitlines()[-15:])
    return {"status": "failed", "reason": f"ended with code {code}", "seconds": took, "output": lines}


def _call(command: Sequence[str], environment: dict[str, str], seconds: float, capture: bool) -> tuple[int | None, str]:
    """Return exit code and output of a command; None where it took longer than `seconds`: then it and all that it
    started are ended.
    """
    pipe = subprocess.PIPE if capture else None
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=pipe,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, ""
        raise
    return process.returncode, output or ""


def _end_with_parent() -> None:
    """Ends a child where its report is killed, so that two runs never write to one record (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **offline, **extra}


def _summary(results: list[Row], reduced: bool) -> list[str]:
    """Return the end of the report: checks, steps, what is missing, goals. The kernels' table is long: see the page."""
    checks = [[r["case"], r["status"], r.get("summary", r["reason"])] for r in results if r["section"] in CHECKS]
    planned = len(TABLES["reduced" if reduced else "gpu"]())
    done = [row for row in results if row["section"] == "kernels"]
    missing = [f"* {line}" for line in reasons(results)]
    return [
        "REDUCED: tiny sizes, no figure below means anything" if reduced else "",
        markdown(["check", "status", "result"], checks),
        f"kernels: {len({row['case'] for row in done})} of {planned} cases measured",
        step_table(results),
        option_table(results),
        "\n".join(missing),
        goal_table(results),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes; needed with --device cpu")
    parser.add_argument("--output", type=Path, help="the record; default benchmarks/results/<device>/report.jsonl")
    parser.add_argument("--fresh", action="store_true", help="begin a new record instead of continuing the old one")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every section's time")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.reduced:
        parser.error("--device cpu goes with --reduced; `make bench` measures the CPU subset")
    if arguments.reduced and arguments.output is None:
        parser.error("--reduced needs --output: its figures mean nothing and belong beside no real ones")
    check_device(arguments.device)
    output = arguments.output or device_folder(device_name(arguments.device)) / RECORD_NAME
    if arguments.fresh:
        output.unlink(missing_ok=True)
    report = Report(arguments.device, arguments.reduced, output.resolve(), arguments.scale)
    report.run()
    results = report.record.results()
    print("\n" + "\n\n".join(filter(None, _summary(results, arguments.reduced))))
    print(f"\nrecord: {output}")
    return 1 if any(row["status"] == "failed" for row in results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: what was started is ended too
    sys.exit(main())
