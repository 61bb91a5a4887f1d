"""Options of `pytest benchmarks`, its cases, and the table at its end."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.record import Row
from benchmarks.shapes import TABLES

KEY = pytest.StashKey[tuple[str, str, list[Row]]]()  # device, table of cases, all rows measured


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", choices=sorted(TABLES), help="table of cases; default: gpu where there is a GPU, cpu elsewhere"
    )


def pytest_configure(config: pytest.Config) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        os.environ.setdefault("EPT_KERNELS", "triton")  # read when ept_kernels is imported
    config.stash[KEY] = device, config.getoption("--cases") or ("gpu" if device == "cuda" else "cpu"), []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [
        pytest.param(case, provider, id=f"{case.id}-{provider}".replace("/", "-"))
        for case in TABLES[metafunc.config.stash[KEY][1]]()
        for provider in case.providers
    ]
    metafunc.parametrize("case, provider", pairs)


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest) -> tuple[str, str, list[Row]]:
    """Returns the device, the table of cases, and the list that all rows go into."""
    return request.config.stash[KEY]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from benchmarks.tables import peer_table

    _, table, rows = config.stash[KEY]
    if rows:
        reduced = " (reduced sizes: no figure means anything)" if table == "reduced" else ""
        terminalreporter.section(f"kernels against peers, {rows[0]['device']}{reduced}")
        terminalreporter.write_line(peer_table(rows))
