"""Operators against their peers under pytest-benchmark: `pytest benchmarks` (`-k dequantize` to choose).

All versions of a case are measured together, in turn, by `benchmarks.operators`: device time, bytes, fraction of the
ceiling. Each then runs once more under pytest-benchmark, whose own table shows what a call costs with the host's work;
our numbers go into its `extra_info` and into the table at the end.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.record import Row, measured_with
from benchmarks.shapes import Case

ROUNDS = 5


@pytest.fixture(scope="module")
def measured(session: tuple[str, str, list[Row]]) -> Any:
    """Gives a version's row and its call; all versions of a case are measured at the first one asked for."""
    from benchmarks import operators, problems

    device, table, rows = session
    about = measured_with(device, table == "reduced")
    held: dict[str, tuple[dict[str, Row], Any]] = {}

    def measure(case: Case, provider: str) -> tuple[Row, Any]:
        if case.id not in held:
            held.clear()  # frees the last case's inputs before the next one's are made
            prepared = problems.prepare(case, device, compile_allowed=table != "reduced")
            ceilings, _ = operators.measure_ceilings(table, device)
            found = operators.measure(case, prepared, device, operators.CASE_SECONDS[table], ceilings)
            held[case.id] = {row["provider"]: {**operators.described(case), **row, **about} for row in found}, prepared
            rows.extend(held[case.id][0].values())
        by_provider, prepared = held[case.id]
        return by_provider[provider], prepared.calls.get(provider)

    yield measure
    held.clear()


def test_version(case: Case, provider: str, measured: Any, benchmark: Any, session: Any) -> None:
    """Skips with the reason where a version cannot run, fails where it is wrong."""
    import torch

    row, call = measured(case, provider)
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]

    def synchronised() -> None:
        call(0)
        if session[0] == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.id
    benchmark.extra_info.update(row)
    benchmark.pedantic(synchronised, rounds=ROUNDS, warmup_rounds=1)
