"""Processes of a benchmark: this repository comes first on their path, and they end in time with all their children."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .record import ROOT, Row

PR_SET_PDEATHSIG = 1  # Linux' prctl: the signal that a process gets when its parent ends
TICK = 0.05  # seconds between two checks of the processes


def environment(**extra: str) -> dict[str, str]:
    """Returns the variables of a process that finds this repository first and uses no network."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **offline, **extra}


def start(command: Sequence[str], variables: dict[str, str], output: int | None = None) -> subprocess.Popen[str]:
    """Starts a command in its own process group, writing to `output` (a file descriptor) if given."""
    options: Row = {} if output is None else {"stdout": output, "stderr": subprocess.STDOUT}
    if sys.platform == "linux":
        # The child ends if its parent is killed, so that two runs never write to one record.
        options["preexec_fn"] = functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    return subprocess.Popen(command, cwd=ROOT, env=variables, **options, text=True, start_new_session=True)


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_command(command: Sequence[str], variables: dict[str, str], seconds: float) -> Row:
    """Returns `status` and `reason` of a command that should exit with code 0 in time; if not, also its last lines."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = start(command, variables, output.fileno())
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        output.seek(0)
        last = "\n".join(output.read().strip().splitlines()[-15:])
    row: Row = {"status": "failed", "reason": f"ended with code {code}", "seconds": time.monotonic() - began}
    if code == 0:
        return {**row, "status": "ok", "reason": ""}
    if code is None:
        row.update(reason=f"not finished after {seconds:.0f} s", timed_out=True)
    return {**row, "output": last}


@dataclass
class Job:
    """A command that may be started `starts` times if its process dies; `name` is printed if it does."""

    name: str
    command: Sequence[str]
    starts: int


def run_jobs(jobs: Sequence[Job], at_once: int, deadline: float, variables: dict[str, str]) -> list[str]:
    """Runs jobs, `at_once` at a time, until all have exited with code 0 or `time.monotonic()` is past the deadline.

    A job whose process dies goes to the end of the queue. Returns the names of those that were cut off by the deadline
    or given up.
    """
    waiting, left = list(jobs), []
    running: dict[subprocess.Popen[str], Job] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[start(job.command, variables)] = job
            time.sleep(TICK)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                job.starts -= 1
                if process.returncode == 0:
                    continue
                said = "begun again" if job.starts else "given up"
                print(f"{job.name}: the process ended with code {process.returncode}: {said}", flush=True)
                if job.starts:
                    waiting.append(job)
                else:
                    left.append(job.name)
    finally:
        for process in running:
            stop(process)
    return [*left, *(job.name for job in (*running.values(), *waiting))]
