"""A training process killed with SIGKILL again and again ends with what an uninterrupted one ends with, bit for bit.

`EPT_KILLS` is the number of kills, `EPT_KILLS_SEED` what draws the moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from forked_runs import logged_step
from forks import Forks, Running, Whole

from ept.runs.folder import SEAL, RunFolder, checkpoint_folders

KILLS = int(os.environ.get("EPT_KILLS", "30"))
SEED = int(os.environ.get("EPT_KILLS_SEED", "0"))


@dataclass(frozen=True)
class Moment:
    """A moment to kill at: some time after a step has been logged, while a checkpoint of a later step is being written,
    or, by the process itself, at a change of a file in the run's folder after that step.
    """

    kind: str
    step: int
    delay: float
    change: int

    def await_and_kill(self, running: Running, folder: Path) -> None:
        before = halves(folder)
        while not (self._saving(folder, before) if self.kind == "saving" else logged_step(folder) >= self.step):
            assert running.at_work(), f"{self} did not come:\n{running.said()}"
            time.sleep(0.001)
        time.sleep(self.delay if self.kind == "logged" else self.delay / 20)
        running.send(signal.SIGKILL)

    def _saving(self, folder: Path, before: set[Half]) -> bool:
        return any(half.step >= self.step for half in halves(folder) - before)


class Half(NamedTuple):
    """A checkpoint that is not whole, as it was left: a later attempt at the same step is another one."""

    step: int
    inode: int
    changed: int


def halves(run: Path) -> set[Half]:
    found = set()
    for step, path in checkpoint_folders(run / "checkpoints").items():
        with contextlib.suppress(FileNotFoundError):  # deleted since
            if not (path / SEAL).exists():
                found.add(Half(step, path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def moments(count: int, whole: Whole, chance: random.Random) -> list[Moment]:
    """Draws moments from before the first step (-1: before anything is logged) to after the last."""
    last, saved_before = whole.steps, whole.steps - whole.every
    steps = sorted([-1, last, last, *(chance.randint(0, last - 1) for _ in range(count - 3))])
    kinds = [chance.choice(("logged", "saving", "change")) for _ in steps]
    kinds[0], kinds[-2:] = "logged", ["change", "change"]
    return [
        Moment(
            kind, min(step, saved_before) if kind == "saving" else step, chance.random() * 0.1, chance.randint(1, 12)
        )
        for kind, step in zip(kinds, steps)
    ]


@pytest.mark.slow
def test_a_run_killed_at_random_moments(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    last, survived, left = 0, Counter[str](), 0
    for moment in moments(KILLS, whole, random.Random(SEED)):
        before = halves(run)
        itself = {"folder": str(run), "step": moment.step, "change": moment.change}
        running = forks.start(*whole.command, run, "--resume", die_in=itself if moment.kind == "change" else None)
        if moment.kind != "change":
            moment.await_and_kill(running, run)
        assert running.ended() == -signal.SIGKILL, f"{moment}:\n{running.said()}"
        survived[moment.kind] += 1
        checkpoint = RunFolder(run).last_checkpoint()
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        assert step >= last, f"{moment}: the checkpoint of step {last} is lost"
        last = step
        left += bool(halves(run) - before)
    print(f"\n{survived.total()} kills survived: {dict(survived)}; {left} left half a checkpoint")
    assert survived.total() == KILLS
    assert left >= KILLS // 6, "too few kills came while a checkpoint was being written"

    whole.finish(forks, run)


def test_a_run_killed_before_its_last_checkpoint_had_replaced_older_ones(
    forks: Forks, whole: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.folder, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "adapter")
    last = run / "checkpoints" / f"checkpoint-{whole.steps}"
    shutil.copytree(last, last.with_name(f"checkpoint-{whole.steps - 1}"))

    whole.finish(forks, run)
