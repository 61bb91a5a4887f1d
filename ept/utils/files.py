"""Files that survive a crash: each is complete or absent, and on disk before anything that relies on it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(file: Path, content: str | Callable[[Path], object]) -> None:
    """Writes `file` under a temporary name and renames it, so that half of it is never seen, even after a power cut.

    Args:
        content: the text, or a function that writes the file whose path it is given.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # never write through a link of that name
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        sync(temporary)
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def strict_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Writes JSON that any parser reads: null for NaN and infinities, text for dates and the like."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, ensure_ascii=ensure_ascii, default=str, allow_nan=False)


def json_record(value: Any, indent: int | None = None) -> str:
    """Writes strict JSON for a file that programs read: ASCII alone, and a line feed at the end."""
    return strict_json(value, indent, ensure_ascii=True) + "\n"


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Waits until the content of a file is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk, if the file system supports that for folders."""
    with contextlib.suppress(OSError):
        sync(folder, os.O_RDONLY)


def sync_tree(folder: Path) -> None:
    """Waits until everything below `folder` is on the disk: contents, then names."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
