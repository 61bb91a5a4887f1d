"""What every benchmark shares: where a record goes, how it is written, and what it was measured with.

A record is one file of JSON lines. It begins with a header (command, device, versions, a fingerprint of the sources);
then every unit of work writes a `begin` line, its results, and an `end` line, each forced to the disk as it is
written. A unit without its `end` was interrupted: its results do not count, and it is measured again. A unit that was
begun `ATTEMPTS` times without an end is given up, and its failure is a result like any other.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ept.utils.environment import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD_NAME = "report.jsonl"
ATTEMPTS = 2

# The libraries whose version every row carries.
ROW_VERSIONS = ("python", "ept", "torch", "triton", "transformers", "bitsandbytes", "peft")


def device_name(device: str) -> str:
    """`cpu`, or the GPU's own name."""
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def device_folder(name: str) -> Path:
    """Where the records of a device are kept: `benchmarks/results/<device>`."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def check_device(device: str) -> None:
    """Raises `SystemExit` with the remedy where `device` is `cuda` and torch sees none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU and a CUDA build of "
            "torch, or use --device cpu"
        )


def command_line(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The options that every measuring command has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, to test the code: the figures mean nothing")
    parser.add_argument("--output", type=Path, required=True, help="the record, JSON lines; continued if it is there")
    parser.add_argument("--as-is", action="store_true", help="append to the record whatever it was measured with")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"begin nothing new after so many (default {seconds:g})"
    )


def table_of(arguments: argparse.Namespace) -> str:
    """Which table of cases those options mean: `gpu`, `cpu` or `reduced`."""
    return "reduced" if arguments.reduced else {"cpu": "cpu", "cuda": "gpu"}[arguments.device]


def open_record(arguments: argparse.Namespace, module: str) -> Record:
    """The record that `command_line`'s options name, begun or continued. To be called before `ept_kernels` is
    imported: the kernels have to be asked for on a GPU, and the choice is read then. `--as-is` is for the report,
    which has made or checked the record itself.
    """
    if arguments.device == "cuda":
        os.environ.setdefault("EPT_KERNELS", "triton")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing chooses a GPU by itself
    check_device(arguments.device)
    output = arguments.output.resolve()
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else Path(output.name)
    if arguments.as_is:
        return Record(output)
    command = f"python -m {module} --device {arguments.device} --output {shown}"
    return Record.resume(output, header(command, arguments.device, arguments.reduced))


@functools.cache
def measured_with(device: str, reduced: bool) -> dict[str, Any]:
    """What every row carries: device, versions, and whether sizes were reduced (then no figure means anything)."""
    found = versions()
    return {
        "device": device_name(device),
        "device_type": device,
        "reduced": reduced,
        "versions": {name: found.get(name) for name in ROW_VERSIONS},
    }


def header(command: str, device: str, reduced: bool) -> dict[str, Any]:
    """The first line of a record."""
    return {
        "line": "header",
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources": source_fingerprint(),
        **measured_with(device, reduced),
        "hardware": hardware(),
    }


def source_fingerprint() -> str:
    """Twelve hexadecimal digits over the Python files a measurement depends on."""
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
    def resume(cls, path: Path, header: dict[str, Any]) -> Record:
        """The record at `path` if it was measured with the same sources, versions, device and sizes; a new one
        otherwise, the old one staying beside it as `previous-<name>`.
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

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
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

    def header(self) -> dict[str, Any] | None:
        lines = self.lines()
        return lines[0] if lines and lines[0].get("line") == "header" else None

    def results(self) -> list[dict[str, Any]]:
        """The results of every finished unit; of a unit that was measured again, the last ones."""
        open_units: dict[str, list[dict[str, Any]]] = {}
        finished: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines():
            if line["line"] == "begin":
                open_units[line["unit"]] = []
            elif line["line"] == "result":
                open_units[line["unit"]].append(line)
            elif line["line"] == "end":
                finished[line["unit"]] = open_units.pop(line["unit"])
        return [result for results in finished.values() for result in results]

    def finished(self, unit: str) -> bool:
        return any(line["line"] == "end" and line["unit"] == unit for line in self.lines())

    def attempts(self, unit: str) -> int:
        """How often `unit` was begun."""
        return sum(line["line"] == "begin" and line["unit"] == unit for line in self.lines())

    @contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Writes `begin`, whatever the body adds, and `end` (not when the body raises)."""
        self.append({"line": "begin", "unit": name})
        yield Unit(self, name)
        self.append({"line": "end", "unit": name})

    def give_up(self, name: str, result: dict[str, Any]) -> bool:
        """True, with a failed `result` written, where `name` was begun `ATTEMPTS` times and never ended."""
        if self.attempts(name) < ATTEMPTS:
            return False
        with self.unit(name) as unit:
            unit.add({**result, "status": "failed", "reason": f"the process ended {ATTEMPTS} times while measuring it"})
        return True

    def _cut_off_last_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                self.path.write_bytes(content[:whole])


class Unit:
    """An open unit of a `Record`."""

    def __init__(self, record: Record, name: str) -> None:
        self._record, self._name = record, name

    def add(self, result: dict[str, Any]) -> None:
        self._record.append({"line": "result", "unit": self._name, **result})
