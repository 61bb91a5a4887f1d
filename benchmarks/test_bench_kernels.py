"""Operators against their alternatives under pytest-benchmark: `pytest benchmarks` (`-k dequantize` to choose).

All versions of a case are measured together, in turn, by `benchmarks.operators`: device time, bytes, fraction of the
ceiling. Each then runs once more under pytest-benchmark, whose own table shows the cost of a call including the host's
work; our numbers go into its `extra_info` and into the table at the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import operators, problems
from benchmarks.conftest import SESSION
from benchmarks.record import Row, measured_with
from benchmarks.shapes import TABLES, Case

HELD: dict[str, tuple[dict[str, Row], problems.Prepared]] = {}  # the last case: its rows by version, and its calls


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = TABLES[metafunc.config.stash[SESSION][1]]()
    pairs = [(case, provider) for case in cases for provider in case.providers]
    names = [f"{case.id}-{provider}".replace("/", "-") for case, provider in pairs]
    metafunc.parametrize("case, provider", pairs, ids=names)


def test_version(case: Case, provider: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Skips, with the reason, if a version cannot run; fails if it is wrong."""
    device, table, rows = request.config.stash[SESSION]
    if case.id not in HELD:  # all versions of a case are measured when the first is requested
        HELD.clear()  # frees the last case's inputs before the next one's are made
        about = {**operators.described(case), **measured_with(device, table == "reduced")}
        prepared, found = operators.prepare_and_measure(case, table, device)
        HELD[case.id] = {row["provider"]: {**about, **row} for row in found}, prepared
        rows.extend(HELD[case.id][0].values())
    by_provider, prepared = HELD[case.id]
    row = by_provider[provider]
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]

    def synchronised() -> None:
        prepared.calls[provider](0)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.id
    benchmark.extra_info.update(row)
    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)
