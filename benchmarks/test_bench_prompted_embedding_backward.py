"""`prompted_embedding_backward` against its peers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import Case

KERNEL = "prompted_embedding_backward"


def test_prompted_embedding_backward(case: Case, provider: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, provider)
