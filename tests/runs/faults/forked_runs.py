"""A server that runs `ept` commands in forks of itself: whole processes, to be killed, without seconds of imports each.

It reads a request a line on standard input, as JSON, and answers with the process's id at once and with its wait status
once it has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

# A run imports these on its way.
IMPORTED = (
    *("ept.cli.main", "ept.compare.plan", "ept.compare.tables", "ept.compare.execute", "ept.compare.figures"),
    *("ept.runs.train", "datasets"),
    *("matplotlib.backends.backend_agg", "rich.table", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.modeling_auto", "torch.utils.data", "torch.distributed.fsdp", "safetensors.torch"),
)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection in a fork goes through, and thereby copies, what was imported here
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**request)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def run(arguments: list[str], output: str, die_in: dict[str, Any] | None, largest_file: int | None) -> NoReturn:
    """Runs one command, its standard output and error in the file `output`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork of a background process may have it ignored
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if die_in is not None:
        sys.addaudithook(Death(**die_in))
    from ept.cli.main import app

    code: Any = 1
    try:
        app(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


class Death:
    """Kills its own process at the n-th change of a file in the run's folder, counted from the logging of a step."""

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, folder: str, step: int, change: int) -> None:
        self.folder, self.step, self.changes_left = folder, step, change
        self.looking = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.looking or not (event in self.CHANGES or (event == "open" and self._writes(arguments))):
            return
        if self.folder not in str(arguments[0]) or not self._reached():
            return
        self.changes_left -= 1
        if self.changes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))

    def _reached(self) -> bool:
        self.looking = True
        try:
            return logged_step(Path(self.folder)) >= self.step
        finally:
            self.looking = False


def logged_step(run: Path) -> int:
    """Returns the last step of which `metrics.jsonl` has a whole line; -1 without one."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return -1
    return int(json.loads(lines[-1])["step"]) if lines else -1


if __name__ == "__main__":
    main()
