"""Leaves out what the lowest supported Triton cannot do."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata

import pytest
from packaging.version import Version


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_old = importlib.util.find_spec("triton") is not None and Version(metadata.version("triton")) < Version("3.5")
    if is_old and "TRITON_HIP_LLD_PATH" not in os.environ:
        reason = "Triton 3.4 links for AMD GPUs with ROCm's own linker"
        for item in items:
            if "gfx942" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
