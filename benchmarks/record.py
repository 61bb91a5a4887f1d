"""A record of measurements: one file of JSON lines that survives an interruption at any moment, and its units of work.

It begins with a header (command, device, versions, a fingerprint of the sources); then every unit of work writes a
`begin` line, its results, and an `end` line, each forced to the disk as it is written. A unit without its `end` was
interrupted: its results do not count, and it is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ept.utils.environment import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD_NAME = "report.jsonl"

# The libraries whose version every row carries.
ROW_VERSIONS = ("python", "ept", "torch", "triton", "transformers", "bitsandbytes", "peft")

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One unit of a record.

    Attributes:
        unit: its name, `section/…`. rows: measures it. described: fields of all its rows beside section and case.
        needs: a package without which it is skipped. on_request: measured only where `--only` names it.
    """

    unit: str
    rows: Callable[[], Iterable[Row]]
    described: Row = field(default_factory=dict, hash=False)
    needs: str = ""
    on_request: bool = False


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Returns rows by case and version, in the order measured."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def is_measured(row: Row) -> bool:
    """Tells a measurement from what reduced sizes or a rehearsal left, whose figures mean nothing."""
    return not row["reduced"] and not row.get("rehearsal", False)


def profile_row(method: Row, record: Row) -> Row:
    """Makes a row of one method of an `ept profile` record: milliseconds become seconds."""
    kept = ("tokens_per_second", "trainable_parameters", "num_virtual_tokens")
    return {
        "provider": method["method"],
        **{name: 1e-3 * method["step_ms"][name] for name in ("median", "p20", "p80")},
        "samples": len(method["step_ms"]["samples"]),
        "phases": {name: 1e-3 * value for name, value in method["phases_ms"].items()},
        "peak_bytes": method["peak_memory_bytes"],
        "peak_kind": record["peak_memory_kind"],
        **{name: method[name] for name in kept},
        "model": record["model"],
        "size": {"batch": record["batch"], "length": record["length"]},
    }


def check_device(device: str) -> None:
    """Raises `SystemExit` with the remedy where `device` is `cuda` and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU and a CUDA build of "
            "torch, or use --device cpu"
        )


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Returns the command that gives a record again. Paths are relative to the repository; of others only the name."""
    paths = {argument: Path(argument).resolve() for argument in arguments if os.sep in argument}
    shown = {name: str(path.relative_to(ROOT)) if ROOT in path.parents else path.name for name, path in paths.items()}
    return f"python {program} {shlex.join(shown.get(argument, argument) for argument in arguments)}".rstrip()


@functools.cache
def measured_with(device: str, reduced: bool, rehearsal: bool = False) -> Row:
    """Returns the fields of every row: device, versions, and whether figures mean nothing: sizes were reduced, or a GPU
    was only compiled for.
    """
    found = versions()
    return {
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "device_type": device,
        "reduced": reduced,
        "rehearsal": rehearsal,
        "versions": {name: found.get(name) for name in ROW_VERSIONS},
    }


def header(command: str, device: str, reduced: bool, rehearsal: bool = False) -> Row:
    """Returns the first line of a record."""
    return {
        "line": "header",
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources": source_fingerprint(),
        **measured_with(device, reduced, rehearsal),
        "hardware": hardware(),
    }


def source_fingerprint() -> str:
    """Returns twelve hexadecimal digits over the Python files a measurement depends on."""
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
        content = path.read_bytes() if path.exists() else b""
        if not content.endswith(b"\n") and content:
            path.write_bytes(content[: content.rfind(b"\n") + 1])

    @classmethod
    def resume(cls, path: Path, header: Row) -> Record:
        """Continues the record at `path` if it was measured with the same sources, versions, device and sizes; begins a
        new one otherwise, the old one staying beside it as `previous-<name>`.
        """
        record = cls(path)
        same = ("sources", "device", "device_type", "reduced", "rehearsal", "versions")
        found = record.header() or {}
        if any((found.get(key) or False) != (header.get(key) or False) for key in same):
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
        found: list[Row] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {len(found) + 1} is no JSON ({error}): delete the file and measure again"
                ) from error
        return found

    def header(self) -> Row | None:
        return next((line for line in self.lines()[:1] if line.get("line") == "header"), None)

    def results(self) -> list[Row]:
        """Returns the results of every finished unit; of a unit that was measured again, the last ones."""
        return [result for results in self._units()[1].values() for result in results]

    def finished(self, unit: str) -> bool:
        """Tells whether `unit` has ended, and not because its time was up."""
        results = self._units()[1].get(unit)
        return results is not None and not any(result.get("timed_out") for result in results)

    def attempts(self, unit: str) -> int:
        """Counts how often `unit` was begun and did not end."""
        return self._units()[0][unit]

    def _units(self) -> tuple[Counter[str], dict[str, list[Row]]]:
        """Returns by unit how often it was begun and did not end, and the results of those that did."""
        attempts: Counter[str] = Counter()
        begun: dict[str, list[Row]] = {}
        finished: dict[str, list[Row]] = {}
        for line in self.lines():
            unit = line.get("unit", "")
            if line["line"] == "begin":
                attempts[unit] += 1
                begun[unit] = []
            elif line["line"] == "result":
                begun[unit].append(line)
            elif line["line"] == "end":
                attempts[unit] -= 1
                finished[unit] = begun.pop(unit)
        return attempts, finished

    @contextmanager
    def unit(self, name: str) -> Iterator[Callable[[Row], None]]:
        """Writes `begin`, the results that the body adds, and `end` (not when the body raises)."""
        self.append({"line": "begin", "unit": name})
        yield lambda result: self.append({"line": "result", "unit": name, **result})
        self.append({"line": "end", "unit": name})
