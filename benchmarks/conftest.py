"""pytest-benchmark suites, one a kernel: `pytest benchmarks` (`-k name` to choose).

All versions of a case are measured together, in turn, by `benchmarks.operators`: device time, bytes, fraction of the
ceiling. Each then runs once more under pytest-benchmark, whose own table shows what a call costs with the host's work;
our numbers go into its `extra_info` and into the table at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.shapes import TABLES, Case

ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", choices=sorted(TABLES), help="table of cases; default: gpu where there is a GPU, cpu elsewhere"
    )


def pytest_configure(config: pytest.Config) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        os.environ.setdefault("EPT_KERNELS", "triton")  # read when ept_kernels is imported
    config.stash[SESSION] = Session(device, config.getoption("--cases") or ("gpu" if device == "cuda" else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    pairs = [
        pytest.param(case, provider, id=f"{case.id}-{provider}".replace("/", "-"))
        for case in TABLES[session.table]()
        if case.kernel == metafunc.module.KERNEL
        for provider in case.providers
    ]
    metafunc.parametrize("case, provider", pairs)


class Session:
    """What the tests of one run share: the ceilings, the case being measured, and all rows."""

    def __init__(self, device: str, table: str) -> None:
        self.device, self.table = device, table
        self.rows: list[dict[str, Any]] = []
        self._ceilings: Any = None
        self._case = ""
        self._problem: Any = None
        self._current: dict[str, dict[str, Any]] = {}

    def measured(self, case: Case, provider: str) -> tuple[dict[str, Any], Callable[[int], Any] | None]:
        """The row of one version, and its call; all versions of a case are measured at the first one asked for."""
        from benchmarks import ceilings, operators, record, run_kernels

        if self._ceilings is None:
            self._ceilings, _ = ceilings.measure(self.table, self.device)
        if case.id != self._case:
            self._problem = None  # frees the last case's inputs before the next one's are made
            self._problem = operators.build(case, self.device, compile_allowed=self.table != "reduced")
            self._case, seconds = case.id, run_kernels.CASE_SECONDS[self.table]
            rows = operators.measure_problem(case, self._problem, self.device, seconds, self._ceilings)
            about = record.measured_with(self.device, self.table == "reduced")
            self._current = {row["provider"]: {**row, **about} for row in rows}
            self.rows += self._current.values()
        return self._current[provider], self._problem and self._problem.calls.get(provider)


SESSION = pytest.StashKey[Session]()


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str], None]:
    """Measures one version of a case; skips with the reason where it cannot run, fails where it is wrong."""

    def run(case: Case, provider: str) -> None:
        session = request.config.stash[SESSION]
        row, call = session.measured(case, provider)
        if row["status"] == "skipped":
            pytest.skip(row["reason"])
        assert row["status"] == "ok", row["reason"]
        benchmark.group = case.id
        benchmark.extra_info.update(row)
        benchmark.pedantic(_synchronised(call, session.device), args=(0,), rounds=ROUNDS, warmup_rounds=1)

    return run


def _synchronised(call: Any, device: str) -> Callable[[int], Any]:
    if device != "cuda":
        return call
    import torch

    def run(index: int) -> None:
        call(index)
        torch.cuda.synchronize()

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from benchmarks.tables import peer_table

    session = config.stash[SESSION]
    if session.rows:
        reduced = " (reduced sizes: no figure means anything)" if session.table == "reduced" else ""
        terminalreporter.section(f"kernels against peers, {session.rows[0]['device']}{reduced}")
        terminalreporter.write_line(peer_table(session.rows))
