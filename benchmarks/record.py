"""A record of measurements: a file of JSON lines that survives interruption at any moment, and its units of work.

It begins with a header (command, device, versions, a fingerprint of the sources). Then every unit of work writes a
`begin` line, its results, and an `end` line, each forced to disk when written. A unit without `end` was
interrupted: its results do not count, and it is measured again.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import json
import os
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ept.utils.environment import hardware, versions
from ept.utils.files import json_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD_NAME = "report.jsonl"

# Libraries whose versions are in every row.
ROW_VERSIONS = ("python", "ept", "torch", "triton", "transformers", "bitsandbytes", "peft")

GRACE = 5.0  # seconds after its limit in which a unit may still report by itself

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One unit of a record.

    Attributes:
        unit: its name, `section/…`.
        rows: measures it, and returns one or several rows.
        described: fields of all its rows in addition to section and case.
        needs: package without which it is skipped.
        on_request: measured only if `--only` names it.
        group: in a section whose units do not all share one process, those of a group do.
        limit: seconds after which its process is ended as hanging.
    """

    unit: str
    rows: Callable[[], Row | Iterable[Row]]
    described: Row = field(default_factory=dict, hash=False)
    needs: str = ""
    on_request: bool = False
    group: str = ""
    limit: float = 60.0


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Returns rows by case and version, in the order measured."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def is_measured(row: Row) -> bool:
    """Checks that a row is not from reduced sizes or a rehearsal, whose figures mean nothing."""
    return not row["reduced"] and not row.get("rehearsal", False)


def profile_row(method: Row, record: Row) -> Row:
    """Makes a row from one method of an `ept profile` record: milliseconds become seconds."""
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
    """Raises `SystemExit` with the remedy if `device` is `cuda` and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU and a CUDA build of "
            "torch, or use --device cpu"
        )


def is_device_broken() -> bool:
    """Checks whether an earlier error, such as an illegal access, lets nothing more run in this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Returns the command that makes a record again. Paths are relative to the repository; outside it, only names."""
    paths = {argument: Path(argument).resolve() for argument in arguments if os.sep in argument}
    shown = {name: str(path.relative_to(ROOT)) if ROOT in path.parents else path.name for name, path in paths.items()}
    return f"python {program} {shlex.join(shown.get(argument, argument) for argument in arguments)}".rstrip()


@functools.cache
def measured_with(device: str, reduced: bool, rehearsal: bool = False) -> Row:
    """Returns the fields of every row: device, versions, and whether its figures mean nothing (reduced sizes, or a
    rehearsal that only compiles).
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
    """A record on disk, to which lines are appended, even by several processes at a time.

    A last line that was cut off is ignored; a damaged line anywhere else raises `ValueError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def resume(cls, path: Path, header: Row) -> Record:
        """Continues the record at `path` if it was measured with the same sources, versions, device and sizes.
        Otherwise begins a new one and keeps the old one as `previous-<name>`.
        """
        record = cls(path)
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
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
        with self.path.open("ab", buffering=0) as file:  # in one piece, not interleaved with other processes' lines
            file.write(json_record(line).encode())
            os.fsync(file.fileno())

    def lines(self) -> list[Row]:
        found: list[Row] = []
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in content[: content.rfind("\n") + 1].splitlines():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {len(found) + 1} is not JSON ({error}): delete the file and measure again"
                ) from error
        return found

    def header(self) -> Row | None:
        return next((line for line in self.lines()[:1] if line.get("line") == "header"), None)

    def results(self) -> list[Row]:
        """Returns the results of every finished unit; the last ones, if a unit was measured again."""
        return [result for results in self.units()[1].values() for result in results]

    def units(self) -> tuple[Counter[str], dict[str, list[Row]]]:
        """Returns, by unit, how often it was begun without ending, and the results of those that ended."""
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
            elif line["line"] == "forgiven":
                attempts.clear()
            elif line["line"] == "end":
                attempts[unit] = max(0, attempts[unit] - 1)
                finished[unit] = begun.pop(unit)
        return attempts, finished

    def forgive(self) -> None:
        """Makes unfinished units count as never begun: they did not end the process."""
        if any(self.units()[0].values()):
            self.append({"line": "forgiven"})

    @contextmanager
    def unit(self, name: str, limit: float | None = None, late: Row | None = None) -> Iterator[Callable[[Row], None]]:
        """Writes `begin`, the results that the body adds, and `end` (unless the body raises).

        Args:
            limit: seconds after which the unit fails and this process ends.
            late: the fields of its result then.
        """

        def add(result: Row) -> None:
            self.append({"line": "result", "unit": name, **result})

        def give_up() -> None:
            add({**(late or {}), "status": "failed", "reason": f"not finished after {limit:g} s"})
            self.append({"line": "end", "unit": name})
            os._exit(1)

        self.append({"line": "begin", "unit": name})
        watch = threading.Timer(limit or threading.TIMEOUT_MAX, give_up)
        watch.daemon = True
        if limit is not None:
            watch.start()
            # In case even that thread cannot run: then the unit has not ended, and is begun again.
            faulthandler.dump_traceback_later(limit + GRACE, exit=True)
        try:
            yield add
        finally:
            watch.cancel()
            faulthandler.cancel_dump_traceback_later()
        self.append({"line": "end", "unit": name})


def is_finished(results: list[Row] | None) -> bool:
    """Checks whether a unit with these results has ended, other than by running out of time."""
    return results is not None and not any(result.get("timed_out") for result in results)
