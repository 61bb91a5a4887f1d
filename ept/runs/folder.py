"""A run's folder: where its files are, whether it may be written, and how to continue it after an interruption."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import sync, sync_folder, sync_tree, write_atomically
from .checkpoints import last_whole
from .config import RunConfig, load_run_config

# What a resumed run may set otherwise: it changes memory and disk, not what is trained.
MAY_CHANGE = ("training.gradient_checkpointing", "training.eval_batch_size", "training.save_total_limit")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def curve(self) -> Path:
        return self.path / "learning_curve.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def holds_run(self) -> bool:
        return any(path.exists() for path in (self.config, self.metrics, self.adapter, self.results, self.checkpoints))

    def check(self, config: RunConfig, resume: bool, overwrite: bool, processes: int = 1) -> None:
        """Refuses, before anything is written, a folder that a run may not go to.

        Raises:
            FileExistsError: it holds a run and neither argument is set; or the run to resume is finished.
            ValueError: both are set, or the run to resume has another configuration or ran in another number of
                processes.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: continue the run, or start it anew")
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file: choose another output folder")
        if overwrite or not self.holds_run():
            return
        if not resume:
            raise FileExistsError(
                f"{self.path} already holds a run: --resume continues it, --overwrite deletes it and starts anew"
            )
        if self.results.exists():
            raise FileExistsError(
                f"the run in {self.path} is finished: `ept evaluate {self.path}` scores it, --overwrite starts it anew"
            )
        if self.config.exists():
            changed = _differences(yaml.safe_load(self.config.read_text(encoding="utf-8")), config.to_dict())
            if changed:
                raise ValueError(
                    f"cannot resume {self.path}: its configuration differs in {'; '.join(changed)}. "
                    "Resume without these changes, or --overwrite"
                )
        checkpoint = self.last_checkpoint()
        before = len(_random_states(checkpoint)) if checkpoint else processes
        if before != processes:
            raise ValueError(
                f"cannot resume {self.path}: {checkpoint.name} is of a run in {before} processes, this one has "  # type: ignore[union-attr]
                f"{processes}: start {before} (torchrun --nproc-per-node), or --overwrite"
            )

    def begin(self, config: RunConfig, resume: bool) -> Path | None:
        """Makes the folder, or clears it of an earlier run's files alone; returns the checkpoint to start from."""
        if not resume:
            # The configuration goes last: were this cut short, checkpoints would never stand without theirs.
            self.results.unlink(missing_ok=True)
            for folder in (self.checkpoints, self.adapter, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.curve, self.metrics, self.config):
                file.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config.to_yaml())
        return self.last_checkpoint() if resume else None

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; half-written ones, from a run that was killed while saving, are passed over."""
        return last_whole(self.checkpoints)

    def load_config(self) -> RunConfig:
        """The configuration of the run in this folder.

        Raises:
            FileNotFoundError: it holds no run.
        """
        if not self.config.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run: there is no config.yaml (`ept train --output` makes one)"
            )
        return load_run_config(self.config)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps; survives being cut off within a line.

    Of several processes all but one have `writes=False`.
    """

    def __init__(self, file: Path, writes: bool = True) -> None:
        self.file, self.writes = file, writes

    def read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        events = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed; nothing whole can follow it
        return events

    def keep_until(self, step: int) -> None:
        """Drops what was logged after `step`: a resumed run logs it again."""
        if not self.writes:
            return
        kept = [event for event in self.read() if event["step"] <= step]
        write_atomically(self.file, "".join(json.dumps(event) + "\n" for event in kept))

    def append(self, event: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def sync(self) -> None:
        """Waits until all of it is on the disk, as it must be before a checkpoint counts that it leads up to."""
        if self.writes and self.file.exists():
            sync(self.file)


def save_adapter(model: Any, folder: Path) -> None:
    """`model.save_pretrained` into a folder that appears whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(str(temporary))
    sync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync_folder(folder.parent)


def _random_states(checkpoint: Path) -> list[Path]:
    """The states of the random generators: rng_state.pth of one process, rng_state_0.pth, … of several."""
    return sorted(checkpoint.glob("rng_state*.pth"))


def _differences(saved: dict[str, Any], given: dict[str, Any], path: str = "") -> list[str]:
    changed = []
    for key in given:
        if path == "" and key == "output_dir":
            continue
        old, new = (saved or {}).get(key), given[key]
        if isinstance(new, dict) and isinstance(old, dict) and path == "":
            changed += _differences(old, new, f"{key}.")
        elif old != new and path + key not in MAY_CHANGE:
            changed.append(f"{path}{key} (was {old!r}, now {new!r})")
    return changed
