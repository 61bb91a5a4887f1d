"""`matmul_4bit_backward` against its peers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import Case

KERNEL = "matmul_4bit_backward"


def test_matmul_4bit_backward(case: Case, provider: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, provider)
