"""Fixtures of tests of runs: each family in turn, and the configuration of a short run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import ONE_A_TASK

if TYPE_CHECKING:  # on a GPU host without the libraries that runs need this file is imported all the same
    from ept.runs.config import RunConfig


@pytest.fixture(params=ONE_A_TASK)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def configure(no_curves: None, models: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the configuration of a run of a family, with settings, in `tmp_path` under a name (None: nowhere)."""

    from tiny_runs import run_config

    def make(family: str, *settings: str, name: str | None = "run") -> RunConfig:
        return run_config(models[family], data, tmp_path / name if name else None, *settings)

    return make
