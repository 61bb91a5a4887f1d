"""The kernels' tests as rows of a record: one per test, written as it ends, with a time limit for each.

Every process runs a share of the tests. It ends if a test breaks the device's context or hangs; restarted, it continues
with the next test.
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

LIMIT = 60.0  # seconds per test; twice as many for one marked `gpu`, which may compile a whole model
MAX_ATTEMPTS = 2  # of a test whose process died
KERNELS = "tests/kernels/triton_kernels"

MARKED = "marked"  # the group of tests in other folders
REDUCED = ("--noconftest", "tests/benchmarks/test_bench_counts.py")


def run_tests(record: Record, about: Row, table: str, group: str = "", files: tuple[str, ...] = ()) -> bool:
    """Runs the tests of a group that `record` lacks; returns whether all have ended.

    Args:
        about: `measured_with` of the device, added to every row.
        group: a share of the kernels' tests, such as `3/8`; `MARKED`: the tests marked `gpu` in other folders.
        files: pytest's arguments, instead of the group's.
    """
    share, _, shares = group.partition("/") if group and group != MARKED else ("1", "", "1")
    rows = Rows(record, about, table, int(share) - 1, int(shares))
    # A missing package makes the collection of a file fail, which is a row and does not end the run.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.ExitCode(pytest.main([*options, *(files or arguments(table, group))], plugins=[rows]))
    if not rows.has_collected:
        last = "\n".join(printed.getvalue().splitlines()[-15:])
        reason = f"no test was found (pytest ended with {code!r})"
        rows.write("collection", "failed", reason, output=last)
        print(f"{reason}:\n{last}", flush=True)
    return not rows.is_device_broken and code != pytest.ExitCode.INTERNAL_ERROR


def arguments(table: str, group: str) -> tuple[str, ...]:
    """Returns pytest's arguments. The kernels' sessions leave out files of other folders: tests import their folder's
    `conftest` by that name, and a process has only one of that name.
    """
    if table == "reduced":
        return REDUCED
    if group != MARKED:
        return (KERNELS, *(("--compile-only", "sm_90") if table == "rehearsal" else ()))
    files = (path for path in sorted(ROOT.glob("tests/**/test_*.py")) if ROOT / KERNELS not in path.parents)
    return tuple(str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8"))


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
            self.write(item.nodeid, "failed", f"the process ended {MAX_ATTEMPTS} times while running it")
        items[:] = left

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.share:
            self.write(report.nodeid, *_failure(report))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.reports.clear()
        began = time.monotonic()
        limit = LIMIT * (1 if item.get_closest_marker("gpu") is None else 2)
        with self.record.unit(unit_of(item.nodeid), limit, self._described(item.nodeid)) as add:
            result = yield
            status, reason = _outcome(self.reports)
            self.is_device_broken = is_device_broken()  # also by a kernel whose results it has not read
            if self.is_device_broken and status != "failed":
                status, reason = "failed", "a kernel that it launched broke the device's context"
            seconds = time.monotonic() - began
            add({**self._described(item.nodeid), "status": status, "reason": reason, "seconds": seconds})
        if status == "failed":
            print(f"failed: {item.nodeid}: {reason}", file=sys.stderr, flush=True)
        if self.is_device_broken:
            item.session.shouldstop = "the device's context is broken"
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def _is_wanted(self, item: Any) -> bool:
        if self.table == "reduced" or KERNELS in item.path.as_posix():
            return True
        return self.table == "gpu" and item.get_closest_marker("gpu") is not None

    def _described(self, nodeid: str) -> Row:
        return {"section": "tests", "case": unit_of(nodeid), "provider": "all", **self.about}

    def write(self, nodeid: str, status: str, reason: str, **more: str) -> None:
        """Writes the unit of a test that is not run."""
        with self.record.unit(unit_of(nodeid)) as add:
            add({**self._described(nodeid), "status": status, "reason": reason, **more})


def unit_of(nodeid: str) -> str:
    """Returns the name of a test's unit in a record."""
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
    """Returns status and reason; a test that lacks an optional package is skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = (
        crash.message if crash is not None else str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
    )
    reason = next(iter(reason.splitlines()), "")[:300]
    return "skipped" if reason.startswith("ModuleNotFoundError: No module named") else "failed", reason
