"""`prompted_embedding_packed` against its peers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import Case

KERNEL = "prompted_embedding_packed"


def test_prompted_embedding_packed(case: Case, provider: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, provider)
