"""Checks on this device: the kernels' tests, and the 4-bit dequantisation under NVIDIA's memory checker.

compute-sanitizer --tool memcheck python -m benchmarks.checks     what the checker watches, at odd sizes
"""

from __future__ import annotations

import ctypes
import functools
import itertools
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

import torch

import ept_kernels
from ept_kernels.dev.problems import FourBit

from .record import ROOT, Row, Work

# pytest's arguments by unit and table.
TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpu": {"tests/kernels on the GPU": ("tests/kernels/triton_kernels",), "tests/marked gpu": ("-m", "gpu")},
    "reduced": {"tests/reduced": ("--noconftest", "tests/benchmarks/test_bench_counts.py")},
}
TESTS_SECONDS, SANITIZER_SECONDS = 130.0, 25.0
MIN_SECONDS = 10.0  # of a test run that begins late
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal a process gets when its parent ends

SIZES = ((1, 1), (5, 67), (63, 100), (64, 64), (257, 1000), (1024, 1024))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def works_of(table: str, device: str) -> list[Work]:
    """Returns the test runs and the memory check as units of a record."""
    deadline = time.monotonic() + TESTS_SECONDS
    tests = TESTS.get(table, {}).items()
    works = [Work(unit, functools.partial(run_tests, arguments, device, deadline)) for unit, arguments in tests]
    return [*works, Work("sanitizer/dequantize_4bit", functools.partial(_sanitize, device))]


def run_tests(arguments: Sequence[str], device: str, deadline: float) -> list[Row]:
    """Returns the outcome of one pytest run."""
    seconds = max(MIN_SECONDS, deadline - time.monotonic())
    variables = environment(**({"EPT_KERNELS": "triton"} if device == "cuda" else {}))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        row = run_command([sys.executable, "-m", "pytest", *options, *arguments], variables, seconds)
        if report.exists():
            suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
            tests, failed, errors, skipped = (int(suite.get(n, 0)) for n in ("tests", "failures", "errors", "skipped"))
            passed = tests - failed - errors - skipped
            row["summary"] = f"{passed} passed, {failed + errors} failed, {skipped} skipped"
    return [row]


def _sanitize(device: str) -> list[Row]:
    """Returns what compute-sanitizer says of reads and writes out of bounds."""
    tool = shutil.which("compute-sanitizer")
    if device != "cuda" or tool is None:
        lacks = "compute-sanitizer is not on the PATH" if device == "cuda" else "compute-sanitizer needs a GPU"
        return [{"status": "skipped", "reason": lacks}]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", "benchmarks.checks"]
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds the tool knows.
    variables = environment(EPT_KERNELS="triton", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return [{"tool": "compute-sanitizer memcheck", **run_command(command, variables, SANITIZER_SECONDS)}]


def environment(**extra: str) -> dict[str, str]:
    """Returns the variables of a process that finds this repository first and no network."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **offline, **extra}


def run_command(command: Sequence[str], variables: dict[str, str], seconds: float) -> Row:
    """Returns `status` and `reason` of a command that should end with code 0 in time; its last lines if it did not."""
    began = time.monotonic()
    code, output = call(command, variables, seconds, capture=True)
    row: Row = {"status": "failed", "reason": f"ended with code {code}", "seconds": time.monotonic() - began}
    if code is None:
        return {**row, "reason": f"not finished after {seconds:.0f} s", "timed_out": True}
    if code == 0:
        return {**row, "status": "ok", "reason": ""}
    return {**row, "output": "\n".join(output.strip().splitlines()[-15:])}


def call(
    command: Sequence[str], variables: dict[str, str], seconds: float, capture: bool = False
) -> tuple[int | None, str]:
    """Returns exit code and output of a command; None where it took longer than `seconds`: then it and all that it
    started are ended.
    """
    options: Row = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if capture else {}
    if sys.platform == "linux":
        # The child ends where its parent is killed, so that two runs never write to one record.
        options["preexec_fn"] = functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, **options, text=True, errors="replace", start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, ""
        raise
    return process.returncode, printed or ""


def main() -> None:
    """Dequantises at odd sizes and holds each result against the reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schemes = list(itertools.product(SIZES, ("nf4", "fp4"), (False, True)))
    for (rows, columns), quant_type, nested in schemes:
        weight = FourBit(rows, columns, quant_type=quant_type, nested=nested).weight(device)
        for dtype in DTYPES:
            out = ept_kernels.dequantize_4bit(weight, dtype)
            if not torch.equal(out, ept_kernels.dequantize_4bit_reference(weight, dtype)):
                nesting = " nested" if nested else ""
                raise SystemExit(f"{quant_type}{nesting} {rows}×{columns} {dtype}: differs from the reference")
    checked = len(schemes) * len(DTYPES)
    print(f"{checked} dequantisations equal the reference on {device}, run by {ept_kernels.backend(device)}")


if __name__ == "__main__":
    main()
