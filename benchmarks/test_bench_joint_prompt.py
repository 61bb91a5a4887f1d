"""`joint_prompt` against its peers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import Case

KERNEL = "joint_prompt"


def test_joint_prompt(case: Case, provider: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, provider)
