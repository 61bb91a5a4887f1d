"""Files that outlive a crash: whole or not there at all, and on the disk before anything that counts on them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """The file holds either its old content or all of `text`, never a part, not even after a power cut."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, file)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync(file: Path) -> None:
    """Waits until the content of `file` is on the disk."""
    _fsync(file, os.O_RDWR)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk, where the file system can do that for folders."""
    with contextlib.suppress(OSError):
        _fsync(folder, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for all files in `folder` and the folders in it, then for the names."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
