"""Leaves out what the lowest supported Triton cannot do."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        import triton
    except ImportError:
        return
    if triton.__version__.startswith("3.4.") and "TRITON_HIP_LLD_PATH" not in os.environ:
        reason = "Triton 3.4 links for AMD GPUs with ROCm's own linker: TRITON_HIP_LLD_PATH or a newer Triton runs it"
        for item in items:
            if "gfx942" in item.nodeid and item.path.name in ("test_aot.py", "test_compile_only.py"):
                item.add_marker(pytest.mark.skip(reason=reason))
