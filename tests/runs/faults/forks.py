"""`ept` commands in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from same_run import assert_same_run

from ept.runs.folder import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def environment() -> dict[str, str]:
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels" / "torch-ext")))}


@dataclass
class Running:
    """An `ept` command that is at work in a process of its own."""

    pid: int
    output: Path
    server: subprocess.Popen[str]

    def at_work(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Waits for its end; returns the exit code, or the negative number of the signal that ended it."""
        assert self.server.stdout is not None
        return os.waitstatus_to_exitcode(int(self.server.stdout.readline()))

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")


class Forks:
    """Starts `ept` commands, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.running: Running | None = None
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "forked_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def start(self, *arguments: Any, die_in: dict[str, Any] | None = None, largest_file: int | None = None) -> Running:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        request = {"arguments": [str(a) for a in arguments], "output": str(output), "die_in": die_in}
        self.server.stdin.write(json.dumps({**request, "largest_file": largest_file}) + "\n")
        self.server.stdin.flush()
        self.running = Running(int(self.server.stdout.readline()), output, self.server)
        return self.running

    def close(self) -> None:
        assert self.server.stdin is not None
        if self.running is not None and self.running.at_work():  # a test has failed
            self.running.send(signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(60)
        assert self.server.stdout is not None
        self.server.stdout.close()

    def run(self, *arguments: Any, **how: Any) -> tuple[int, str]:
        """Returns exit code and output of a command that ends by itself."""
        running = self.start(*arguments, **how)
        return running.ended(), running.said()


@dataclass
class Whole:
    """A run that nothing has interrupted; `command`, with a folder behind it, makes it anew."""

    folder: Path
    command: list[str]
    steps: int = 45
    every: int = 4

    def finish(self, forks: Forks, run: Path) -> None:
        """Lets the interrupted run in `run` go on to its end: it leaves what this one has left."""
        code, said = forks.run(*self.command, run, "--resume")
        assert code == 0, said
        assert_same_run(run, self.folder)

    def started(self, forks: Forks, run: Path, step: int) -> Path:
        """Makes the same run in `run`, killed soon after `step` was logged; returns its last whole checkpoint."""
        running = forks.start(*self.command, run, die_in={"folder": str(run), "step": step, "change": 1})
        assert running.ended() == -signal.SIGKILL, running.said()
        checkpoint = RunFolder(run).last_checkpoint()
        assert checkpoint is not None
        return checkpoint
