"""SIGTERM and Ctrl-C in two processes under torchrun: all stop after one step, which is saved, and go on from there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked_runs import logged_step
from forks import HERE, environment
from same_run import assert_same_run
from tiny_runs import run_config

from ept.runs.folder import RunFolder, checkpoint_folders, is_whole

LAUNCHER = None
STEPS = 60
# Of one run, each time it goes on: after which step a signal comes, which one, and to which process.
STOPS: list[tuple[int, signal.Signals, int | None]] = [(9, signal.SIGTERM, LAUNCHER), (30, signal.SIGINT, 1)]
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
TELLS = re.compile(rf"stopped by (\S+) after step (\d+) of {STEPS}, which is saved: `torchrun (.*)` continues")


class Launch:
    """Two processes under torchrun, what they say in the file `output`."""

    def __init__(self, output: Path, *words: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())

    def worker(self, rank: int) -> int:
        """Returns its process id."""
        launcher = self.process.pid
        for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
        raise AssertionError(f"process {rank} is not at work:\n{self.said()}")

    def send_after(self, step: int, run: Path, number: signal.Signals, rank: int | None) -> None:
        while logged_step(run) < step:
            assert self.process.poll() is None, self.said()
            time.sleep(0.002)
        os.kill(self.process.pid if rank is LAUNCHER else self.worker(rank), number)

    def ended(self) -> int:
        return self.process.wait(300)

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")


@contextmanager
def launched(output: Path, *words: str) -> Iterator[Launch]:
    launch = Launch(output, *words)
    try:
        yield launch
    finally:
        if launch.process.poll() is None:  # a test has failed; the launcher ends its processes
            launch.process.terminate()
            launch.process.wait(60)


@pytest.mark.slow
def test_stopped_processes_agree_and_go_on(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    settings = (f"training.max_steps={STEPS}", "training.eval_steps=40", "training.logging_steps=3")
    config.write_text(run_config(models["llama"], data, None, *settings).to_yaml(), encoding="utf-8")
    run, whole = tmp_path / "a run", tmp_path / "whole"
    train = ("train", "--config", str(config), "--output")
    words = ["--nproc-per-node", "2", "-m", "ept", *train, str(run)]
    last = 0
    for index, (step, number, rank) in enumerate(STOPS):
        with launched(tmp_path / f"{index}.txt", *words) as launch:
            launch.send_after(step, run, number, rank)
            assert launch.ended() != 0
        said = launch.said()
        told = [found for line in said.splitlines() if (found := TELLS.fullmatch(line))]
        assert len(told) == 1, said
        name, stopped, again = told[0].groups()
        assert name == NAMES[number]
        assert max(step, last) <= int(stopped) < STEPS
        assert "SIGKILL" not in said
        last = int(stopped)
        assert RunFolder(run).last_checkpoint() == run / "checkpoints" / f"checkpoint-{last}"
        assert all(map(is_whole, checkpoint_folders(run / "checkpoints").values()))
        words = shlex.split(again)

    rest, beginning = words[words.index("train") :], [*train, str(whole)]
    driver = (str(HERE / "several_commands.py"), json.dumps([rest, beginning]))
    with launched(tmp_path / "last.txt", "--standalone", "--nproc-per-node", "2", *driver) as launch:
        assert launch.ended() == 0, launch.said()
    assert_same_run(run, whole)
