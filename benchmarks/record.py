"""A record of measurements: one file of JSON lines that survives an interruption at any moment.

It begins with a header (command, device, versions, a fingerprint of the sources); then every unit of work writes a
`begin` line, its results, and an `end` line, each forced to the disk as it is written. A unit without its `end` was
interrupted: its results do not count, and it is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ept.utils.environment import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD_NAME = "report.jsonl"
MAX_ATTEMPTS = 2  # to measure a unit whose process dies; then that is its result

# The libraries whose version every row carries.
ROW_VERSIONS = ("python", "ept", "torch", "triton", "transformers", "bitsandbytes", "peft")

Row = dict[str, Any]


def device_name(device: str) -> str:
    """Return `cpu`, or the GPU's own name."""
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def device_folder(name: str) -> Path:
    """Return the folder of a device's records: `benchmarks/results/<device>`."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def check_device(device: str) -> None:
    """Raises `SystemExit` with the remedy where `device` is `cuda` and torch sees none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU and a CUDA build of "
            "torch, or use --device cpu"
        )


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return the command that gives a record again. Paths are relative to the repository; of others only the name."""
    shown = []
    for argument in arguments:
        path = Path(argument)
        if os.sep in argument:
            path = path.resolve()
            argument = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        shown.append(argument)
    return f"python {program} {shlex.join(shown)}".rstrip()


@functools.cache
def measured_with(device: str, reduced: bool) -> Row:
    """Return the fields of every row: device, versions, and whether sizes were reduced (no figure means anything)."""
    found = versions()
    return {
        "device": device_name(device),
        "device_type": device,
        "reduced": reduced,
        "versions": {name: found.get(name) for name in ROW_VERSIONS},
    }


def header(command: str, device: str, reduced: bool) -> Row:
    """Return the first line of a record."""
    return {
        "line": "header",
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources": source_fingerprint(),
        **measured_with(device, reduced),
        "hardware": hardware(),
    }


def source_fingerprint() -> str:
    """Return twelve hexadecimal digits over the Python files a measurement depends on."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "ept", "kernels/torch-ext"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


class Record:
    """One record on the disk, appended to line by line.

    Opening it repairs a last line that was cut off. A damaged line anywhere else raises `ValueError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut_off_last_line()

    @classmethod
    def resume(cls, path: Path, header: Row) -> Record:
        """Continue the record at `path` if it was measured with the same sources, versions, device and sizes; begin a
        new one otherwise, the old one staying beside it as `previous-<name>`.
        """
        record = cls(path)
        same = ("sources", "device", "device_type", "reduced", "versions")
        found = record.header()
        if found is None or any(found.get(key) != header[key] for key in same):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = path.with_name(f"previous-{path.name}")
                path.replace(kept)
                print(f"{path.name} was measured with other sources or versions: kept as {kept.name}")
            record.append(header)
        return record

    def append(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[Row]:
        if not self.path.exists():
            return []
        found = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number} is no JSON ({error}): delete the file and measure again"
                ) from error
        return found

    def header(self) -> Row | None:
        lines = self.lines()
        return lines[0] if lines and lines[0].get("line") == "header" else None

    def results(self) -> list[Row]:
        """Return the results of every finished unit; of a unit that was measured again, the last ones."""
        open_units: dict[str, list[Row]] = {}
        finished: dict[str, list[Row]] = {}
        for line in self.lines():
            if line["line"] == "begin":
                open_units[line["unit"]] = []
            elif line["line"] == "result":
                open_units[line["unit"]].append(line)
            elif line["line"] == "end":
                finished[line["unit"]] = open_units.pop(line["unit"])
        return [result for results in finished.values() for result in results]

    def finished(self, unit: str) -> bool:
        """Tells whether `unit` has ended, and not because its time was up."""
        lines = [line for line in self.lines() if line.get("unit") == unit]
        ended = [index for index, line in enumerate(lines) if line["line"] == "end"]
        return bool(ended) and not any(line.get("timed_out") for line in lines[: ended[-1]][-1:])

    def attempts(self, unit: str) -> int:
        """Counts how often `unit` was begun and did not end."""
        lines = [line["line"] for line in self.lines() if line.get("unit") == unit]
        return lines.count("begin") - lines.count("end")

    @contextmanager
    def unit(self, name: str) -> Iterator[Callable[[Row], None]]:
        """Writes `begin`, the results that the body adds, and `end` (not when the body raises)."""
        self.append({"line": "begin", "unit": name})
        yield lambda result: self.append({"line": "result", "unit": name, **result})
        self.append({"line": "end", "unit": name})

    def give_up(self, name: str, result: Row) -> bool:
        """Returns True, with a failed `result` written, where `name` was begun `MAX_ATTEMPTS` times and never ended."""
        if self.attempts(name) < MAX_ATTEMPTS:
            return False
        reason = f"the process ended {MAX_ATTEMPTS} times while measuring it"
        with self.unit(name) as add:
            add({**result, "status": "failed", "reason": reason})
        return True

    def _cut_off_last_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                self.path.write_bytes(content[:whole])
