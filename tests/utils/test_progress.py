"""Without a terminal, long work reports its progress now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ept.utils import progress


@pytest.mark.parametrize("seconds, lines", [(20, ["scoring  2/4 batches  0:00:40 left"]), (9, [])])
def test_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, seconds: float, lines: list[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=10)  # narrower than the line, which stays whole
    for _ in progress.with_lines(range(4), "scoring", console):
        now += seconds
    assert console.file.getvalue().splitlines() == lines  # type: ignore[attr-defined]
