"""Which checkpoints count: those that were written to their end, and whose files are still what was written.

The Trainer writes a checkpoint file by file. Once all are on the disk, `whole.json` is put beside them: their sizes and
checksums. Without it, or with files that differ from it, a checkpoint is half a one, and a resumed run passes it over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import sync_folder, sync_tree, write_atomically

PREFIX = "checkpoint-"
SEAL = "whole.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, whole or not."""
    found = {path.name.removeprefix(PREFIX): path for path in folder.glob(f"{PREFIX}*")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    found = checkpoint_folders(folder)
    return next((found[step] for step in sorted(found, reverse=True) if is_whole(found[step])), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end and none of its files has changed since."""
    sealed = read_seal(checkpoint)
    files = sealed.get("files")
    if not isinstance(files, dict) or f"{PREFIX}{sealed.get('step')}" != checkpoint.name:
        return False
    if not all(name in files and (checkpoint / name).is_file() for name in (*NEEDED, *files)):
        return False
    return all(file == _described(checkpoint / name) for name, file in files.items())


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """What `whole.json` says: `step`, `files`, and what `being_saved` was told to keep; empty without one."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sealed if isinstance(sealed, dict) else {}


def seal(checkpoint: Path, **kept: Any) -> None:
    """Makes a checkpoint count whose files have all been written. `kept` must be JSON."""
    sync_tree(checkpoint)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    files = {path.relative_to(checkpoint).as_posix(): _described(path) for path in paths}
    step = int(checkpoint.name.removeprefix(PREFIX))
    write_atomically(checkpoint / SEAL, json.dumps({"step": step, **kept, "files": files}, indent=1))
    sync_folder(checkpoint.parent)


@contextmanager
def being_saved(
    checkpoint: Path,
    *,
    limit: int,
    best: int | None,
    main: bool = True,
    wait: Callable[[], None] = lambda: None,
    **kept: Any,
) -> Iterator[None]:
    """Within, the files of `checkpoint` are written; afterwards it counts, and older ones that are too many go.

    Args:
        limit: how many checkpoints to keep; the newest and the one of step `best` always stay.
        main: whether this is the process that seals and deletes.
        wait: called where all processes must have come to this point.
        kept: for `read_seal`.
    """
    if main and checkpoint.exists():  # half a one, of a run that was killed
        shutil.rmtree(checkpoint)
    wait()
    try:
        yield
        wait()
        if main:
            seal(checkpoint, **kept)
    except Exception:
        if main:  # the disk may be full, and half a checkpoint is of no use
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    if main:
        delete_surplus(checkpoint, limit, best)


def delete_surplus(newest: Path, limit: int, best: int | None) -> None:
    """Deletes half checkpoints, and the oldest whole ones beyond `limit`; `newest` and that of step `best` stay."""
    step = int(newest.name.removeprefix(PREFIX))
    found = checkpoint_folders(newest.parent)
    halves = {other for other, path in found.items() if other > step or not (path / SEAL).exists()}
    whole = sorted(found.keys() - halves)
    stay = {step, best} & set(whole)
    surplus = len(whole) - max(limit, len(stay))
    going = [other for other in whole if other not in stay][: max(surplus, 0)]
    for other in (*halves, *going):
        shutil.rmtree(found[other], ignore_errors=True)


def _described(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
        return {"bytes": content.tell(), "sha256": digest.hexdigest()}
