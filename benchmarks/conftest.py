"""Options of `pytest benchmarks`, and the table at its end."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.record import Row
from benchmarks.shapes import TABLES

SESSION = pytest.StashKey[tuple[str, str, list[Row]]]()  # device, table of cases, all measured rows


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "default: gpu where there is a GPU, cpu elsewhere"
    parser.addoption("--cases", choices=sorted(TABLES), help=f"table of cases; {default}")


def pytest_configure(config: pytest.Config) -> None:
    device, table = ("cuda", "gpu") if torch.cuda.is_available() else ("cpu", "cpu")
    if device == "cuda":
        os.environ.setdefault("EPT_KERNELS", "triton")  # read when ept_kernels is imported
    config.stash[SESSION] = device, config.getoption("--cases") or table, []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from benchmarks.tables import peer_table

    _, table, rows = config.stash[SESSION]
    if rows:
        reduced = " (reduced sizes: no figure means anything)" if table == "reduced" else ""
        terminalreporter.section(f"kernels against alternatives, {rows[0]['device']}{reduced}")
        terminalreporter.write_line(peer_table(rows))
