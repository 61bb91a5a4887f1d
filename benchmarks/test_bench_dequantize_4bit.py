"""`dequantize_4bit` against its peers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import Case

KERNEL = "dequantize_4bit"


def test_dequantize_4bit(case: Case, provider: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, provider)
