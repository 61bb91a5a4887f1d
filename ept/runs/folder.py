"""A run's folder: its files, which run may be written to it, and which of its checkpoints count.

The Trainer writes a checkpoint file by file. Once all files are on disk, `whole.json` is added, with their sizes and
checksums. A checkpoint without it, or with files that differ from it, is never resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..utils.files import json_record, sync_folder, sync_tree, write_atomically

if TYPE_CHECKING:
    from .config import RunConfig

SPLITS_FILE = "splits.json"
"""File that says which rows are in which split."""

# A resumed run may change these: they affect memory and disk, not what is trained.
MAY_CHANGE = ("training.gradient_checkpointing", "training.eval_batch_size", "training.save_total_limit")

# Keys of a configuration that name files and folders.
_PATHS = {
    "model": ("name_or_path", "tokenizer_name_or_path"),
    "data": ("data_dir", "train_file", "validation_file", "test_file", "splits"),
    "method": ("init_from",),
}

PREFIX = "checkpoint-"
SEAL = "whole.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class RunFolder:
    """The files of a run, and the rules for a folder that may hold an earlier run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.splits = path / SPLITS_FILE
        self.adapter = path / "adapter"
        self.results = path / "results.json"
        self.report = path / "report.md"
        self.curve = path / "learning_curve.png"
        self.confusion = path / "confusion.png"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.holds_other = False  # True as long as a run in the folder is not the one being started

    def holds_run(self) -> bool:
        return any(path.exists() for path in (self.config, self.metrics, self.adapter, self.results, self.checkpoints))

    def check(self, config: RunConfig, resume: bool, overwrite: bool, world_size: int = 1) -> None:
        """Refuses a folder that the run must not use, before anything is written.

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
        more = self.wants_more_steps(config)
        if self.results.exists() and not more:
            raise FileExistsError(
                f"the run in {self.path} is finished: `ept evaluate {shlex.quote(str(self.path))}` scores it, a "
                "larger training.max_steps continues it, --overwrite starts it anew"
            )
        if self.config.exists():
            usual, old = type(config)().to_dict(), read_config(self.config)
            had, wanted = identity(old, usual), identity(config.to_dict(), usual)
            changed = [
                f"{name} (was {had.get(name)!r}, now {now!r})"
                for name, now in wanted.items()
                if had.get(name) != now and not (more and name == "training.max_steps")
            ]
            if changed:
                raise ValueError(
                    f"cannot resume {self.path}: its configuration differs in {'; '.join(changed)}. "
                    "Resume without these changes, or --overwrite"
                )
        checkpoint = self.last_checkpoint()
        # rng_state.pth from a single process, rng_state_0.pth, … from several
        if checkpoint and (before := len(list(checkpoint.glob("rng_state*.pth")))) != world_size:
            raise ValueError(
                f"cannot resume {self.path}: {checkpoint.name} is from a run in {before} processes, but this one has "
                f"{world_size}: start {before} (torchrun --nproc-per-node), or --overwrite"
            )

    def wants_more_steps(self, config: RunConfig) -> bool:
        """Checks whether `config` asks for more steps than the run in the folder has taken or was going to take."""
        checkpoint, wanted = self.last_checkpoint(), config.training.max_steps
        return checkpoint is not None and wanted is not None and wanted > read_state(checkpoint)["max_steps"]

    def check_splits(self, drawn: Any) -> None:
        """Raises ValueError if a resumed run would use other rows than it began with."""
        if self.splits.exists() and json.loads(self.splits.read_text(encoding="utf-8")) != drawn:
            raise ValueError(
                f"cannot resume {self.path}: the data have changed since it began. Bring them back, or --overwrite"
            )

    def begin(self, config: RunConfig, resume: bool) -> Path | None:
        """Creates the folder, or removes only an earlier run's files; returns the checkpoint to start from.

        Checkpoints that a resumed run cannot use are deleted.
        """
        for file in (self.results, self.report, self.curve, self.confusion):  # also if that run is trained on
            file.unlink(missing_ok=True)
        if not resume:
            # The configuration goes last, so that an interruption leaves no checkpoints without one.
            for folder in (self.checkpoints, self.adapter, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.metrics, self.splits, self.config):
                file.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.config, self.metrics, self.splits, self.results, self.report, self.curve, self.confusion):
            for half in self.path.glob(f".{file.name}.*.tmp"):  # left by a killed run
                half.unlink()
        write_atomically(self.config, config.from_dict(with_whole_paths(config.to_dict())).to_yaml())
        checkpoint = self.last_checkpoint() if resume else None
        best = read_state(checkpoint).get("best_global_step") if checkpoint else None
        delete_surplus(self.checkpoints, checkpoint, config.training.save_total_limit, best)
        MetricsLog(self.metrics).keep_until(int(checkpoint.name.removeprefix(PREFIX)) if checkpoint else 0)
        return checkpoint

    def last_checkpoint(self) -> Path | None:
        """Returns the newest complete checkpoint, passing over those that a killed run left unfinished."""
        found = checkpoint_folders(self.checkpoints)
        return next((found[step] for step in sorted(found, reverse=True) if is_whole(found[step])), None)

    def unfinished_checkpoint(self) -> Path | None:
        """Returns the checkpoint that is being written, or was when the run was killed."""
        found = checkpoint_folders(self.checkpoints).values()
        return next((path for path in found if not (path / SEAL).exists()), None)


def with_whole_paths(values: dict[str, Any], whole: Callable[[str], str] = os.path.abspath) -> dict[str, Any]:
    """Returns a configuration's values with existing files and folders as absolute paths.

    A run may be used from another folder than it was trained in, where a relative path is another file or a Hub name.
    """
    values = dict(values)
    for section, keys in _PATHS.items():
        if isinstance(part := values.get(section), dict):
            there = {key: part[key] for key in keys if isinstance(part.get(key), str) and os.path.exists(part[key])}
            values[section] = {**part, **{key: whole(path) for key, path in there.items()}}
    return values


def identity(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that make a run this one and no other, by their dotted names.

    A file or folder is known by where it lies, however that is written and whatever links lead there. Its content is
    not looked at here: `check_splits` does so for the rows. A key that `values` lack, as it is newer, has its value in
    `usual`.
    """
    values, settings = with_whole_paths(values, os.path.realpath), dict[str, Any]()
    for name, default in usual.items():
        value = values.get(name, default)
        if isinstance(default, dict):
            settings |= {f"{name}.{key}": each for key, each in {**default, **(value or {})}.items() if key in default}
        else:
            settings[name] = value
    return {name: value for name, value in settings.items() if name not in (*MAY_CHANGE, "output_dir")}


def read_config(file: Path) -> dict[str, Any]:
    """Returns the values in a run's `config.yaml`."""
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return values


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints in `folder` by step, complete or not."""
    found = {path.name.removeprefix(PREFIX): path for path in folder.glob(f"{PREFIX}*")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def seal(checkpoint: Path, **kept: Any) -> None:
    """Marks a checkpoint with all its files as complete. `kept`, which must be JSON, is for `read_seal`."""
    sync_tree(checkpoint)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    files = {path.relative_to(checkpoint).as_posix(): _size_and_checksum(path) for path in paths}
    step = int(checkpoint.name.removeprefix(PREFIX))
    write_atomically(checkpoint / SEAL, json_record({"step": step, **kept, "files": files}, indent=1).rstrip())
    sync_folder(checkpoint.parent)


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of `whole.json`: `step`, `files`, and what was passed to `seal`; empty if there is none."""
    try:
        sealed: dict[str, Any] = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sealed


def is_whole(checkpoint: Path) -> bool:
    """Checks whether the checkpoint was written completely and none of its files has changed since."""
    sealed = read_seal(checkpoint)
    files = sealed.get("files", {})
    return (
        checkpoint.name == f"{PREFIX}{sealed.get('step')}"
        and all(name in files and (checkpoint / name).is_file() for name in (*NEEDED, *files))
        and all(file == _size_and_checksum(checkpoint / name) for name, file in files.items())
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the Trainer's state from a complete checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def is_over(checkpoint: Path) -> bool:
    """Checks whether training had ended at this checkpoint, by its number of steps or by early stopping."""
    control = read_state(checkpoint).get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def delete_surplus(folder: Path, newest: Path | None, limit: int, best: int | None) -> None:
    """Deletes checkpoints without a seal or from steps after `newest`, and the oldest others beyond `limit`.

    `newest` and the checkpoint of step `best` always stay.
    """
    found = checkpoint_folders(folder)
    step = int(newest.name.removeprefix(PREFIX)) if newest else -1
    whole = [other for other in sorted(found) if other <= step and (found[other] / SEAL).exists()]
    others = [other for other in whole if other not in (step, best)]
    surplus = max(len(whole) - max(limit, len(whole) - len(others)), 0)
    for other in (*(found.keys() - set(whole)), *others[:surplus]):
        shutil.rmtree(found[other], ignore_errors=True)


def _size_and_checksum(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class MetricsLog:
    """The file `metrics.jsonl`: one JSON object per line, in order of steps; survives being cut off within a line.

    A number that is not finite is written as null. All ranks except 0 have `writes=False`.
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
                break  # the run was killed while writing this line, so nothing complete follows it
        return events

    def keep_until(self, step: int) -> None:
        """Drops what was logged after `step`; a resumed run logs it again."""
        kept = [event for event in self.read() if event["step"] <= step]
        write_atomically(self.file, "".join(map(json_record, kept)))

    def append(self, event: dict[str, Any]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json_record(event))


def save_adapter(model: Any, folder: Path) -> None:
    """Saves the model's adapter into a folder, which appears complete or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(str(temporary))
    sync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
