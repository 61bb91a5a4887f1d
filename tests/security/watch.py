"""A watch over a piece of code: files opened, programs started, code run, tensors made.

Python's audit events tell all but what compiled libraries do by themselves; the only one of those that is handed a
stranger's file is safetensors, by a path that the tests of links check.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Events that reading an adapter has no cause for; a prefix stands for all that begin with it.
_NEVER = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"),
    *("os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.", "socket.", "urllib."),
    "pickle.find_class",
)
MAX_MESSAGE = 4000
_LIBRARIES = tuple(
    str(Path(path).resolve())
    for path in {*sysconfig.get_paths().values(), *(p for p in sys.path if p), str(Path(__file__).parents[2])}
    if os.path.isdir(path)
)
_watching: tuple[str, list[str]] | None = None


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collects what happens within that reading the adapter in `folder` has no cause for."""
    global _watching
    offences: list[str] = []
    _watching = (str(folder.resolve()), offences)
    try:
        yield offences
    finally:
        _watching = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    folder, offences = _watching
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            offences.append(f"opened {real} for writing")
        elif not real.startswith(folder + os.sep) and not (
            real.startswith(_LIBRARIES) and real.endswith((".py", ".pyc", ".so", ".json"))
        ):
            offences.append(f"read {real}")
    elif event == "exec":
        file = getattr(arguments[0], "co_filename", "")
        annotation = sys._getframe(1).f_code.co_filename == typing.__file__  # typing evaluates annotations as strings
        if not annotation and not file.startswith((*_LIBRARIES, "<frozen ")):
            offences.append(f"ran code of {file}")
    elif event.startswith(_NEVER):
        offences.append(f"{event} {arguments!r}")


sys.addaudithook(_hook)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator made, in `bytes`."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            return result  # the same memory under another name
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result
