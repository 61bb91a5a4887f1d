"""The kernels' tests as rows of a record: one a test, written as it ends, with a limit a test.

Every process runs a share of the tests. One that broke the device's context ends, and so does one whose test hangs:
begun again, it goes on with the next test.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .record import ROOT, Record, Row, is_device_broken, is_finished

LIMIT = 60.0  # seconds of one test
MAX_ATTEMPTS = 2  # of a test whose process died
KERNELS = "tests/kernels/triton_kernels"

# pytest's arguments by table of cases. What is marked `gpu` lies in other folders, too.
REDUCED = ("--noconftest", "tests/benchmarks/test_bench_counts.py")


def run_tests(record: Record, about: Row, table: str, share: int, shares: int, files: tuple[str, ...] = ()) -> bool:
    """Runs the tests of share number `share` that `record` lacks; returns whether all have ended.

    Args:
        about: `measured_with` of the device, which every row gets. files: pytest's arguments in place of the table's.
    """
    rows = Rows(record, about, table, share, shares)
    # A package that is not here makes a file fail to be collected, which is a row, and not the end.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.ExitCode(pytest.main([*options, *(files or arguments(table))], plugins=[rows]))
    if not rows.has_collected:
        last = "\n".join(printed.getvalue().splitlines()[-15:])
        with record.unit("tests/collection") as add:
            about = {"section": "tests", "case": "tests/collection", "provider": "all", **about}
            add(
                {
                    **about,
                    "status": "failed",
                    "reason": f"no test was found (pytest ended with {code!r})",
                    "output": last,
                }
            )
        print(f"no test was found:\n{last}", flush=True)
    return not rows.is_device_broken and code != pytest.ExitCode.INTERNAL_ERROR


def arguments(table: str) -> tuple[str, ...]:
    """Returns pytest's arguments: the Triton tests, and the files that have a test marked `gpu`."""
    if table == "reduced":
        return REDUCED
    if table == "rehearsal":
        return (KERNELS, "--compile-only", "sm_90")
    marked = [
        path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    others = [str(path.relative_to(ROOT)) for path in marked if ROOT / KERNELS not in path.parents]
    return (KERNELS, *others)


class Rows:
    """A pytest plugin that chooses the tests of its share and writes a unit for each."""

    def __init__(self, record: Record, about: Row, table: str, share: int, shares: int) -> None:
        self.record, self.about, self.table, self.share, self.shares = record, about, table, share, shares
        self.is_device_broken = self.has_collected = False
        self.reports: list[Any] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.has_collected = bool(items)
        attempts, ended = self.record.units()
        chosen = [item for item in items if self._is_wanted(item)][self.share :: self.shares]
        left = [item for item in chosen if not is_finished(ended.get(unit_of(item.nodeid)))]
        for item in [item for item in left if attempts[unit_of(item.nodeid)] >= MAX_ATTEMPTS]:
            left.remove(item)
            self._write(item.nodeid, "failed", f"the process ended {MAX_ATTEMPTS} times while running it")
        items[:] = left

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.share:
            self._write(report.nodeid, *_failure(report))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.reports.clear()
        began = time.monotonic()
        with self.record.unit(unit_of(item.nodeid), LIMIT, self._described(item.nodeid)) as add:
            result = yield
            status, reason = _outcome(self.reports)
            seconds = time.monotonic() - began
            add({**self._described(item.nodeid), "status": status, "reason": reason, "seconds": seconds})
        if status == "failed":
            print(f"failed: {item.nodeid}: {reason}", file=sys.stderr, flush=True)
            self.is_device_broken = is_device_broken()
            if self.is_device_broken:
                item.session.shouldstop = "the device's context is broken"
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def _is_wanted(self, item: Any) -> bool:
        here = self.table == "reduced" or KERNELS in item.path.as_posix()
        return here or item.get_closest_marker("gpu") is not None

    def _described(self, nodeid: str) -> Row:
        return {"section": "tests", "case": unit_of(nodeid), "provider": "all", **self.about}

    def _write(self, nodeid: str, status: str, reason: str) -> None:
        with self.record.unit(unit_of(nodeid)) as add:
            add({**self._described(nodeid), "status": status, "reason": reason})


def unit_of(nodeid: str) -> str:
    """Names the unit of a test in a record."""
    return f"tests/{nodeid.removeprefix('tests/')}"


def _outcome(reports: list[Any]) -> tuple[str, str]:
    for report in reports:
        if report.failed:
            return _failure(report)
    for report in reports:
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    return "ok", ""


def _failure(report: Any) -> tuple[str, str]:
    """Returns status and reason: what lacks a package that may be missing is skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = (
        crash.message if crash is not None else str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
    )
    reason = next(iter(reason.splitlines()), "")[:300]
    return "skipped" if reason.startswith("ModuleNotFoundError: No module named") else "failed", reason
