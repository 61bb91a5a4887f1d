"""Tiny models, separable data, and one short finished run a model family, each made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# The whole runs' imports are in the fixtures: kernels are tested where the libraries that runs need are not installed.


@pytest.fixture(scope="session")
def data(tiny: Path) -> Path:
    return tiny / "data" / "glue" / "sst2"


@pytest.fixture(scope="session")
def models(tiny: Path) -> dict[str, Path]:
    from tiny_runs import FAMILIES

    return {family: tiny / family for family in FAMILIES}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, models: dict[str, Path]) -> dict[str, Path]:
    from tiny_runs import FAMILIES, run_config

    from ept.runs.report import write_report
    from ept.runs.train import train

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ept.runs.train.write_report", write_report)  # whatever module asks first for the runs
        for family in FAMILIES:
            train(run_config(models[family], data, folder / family))
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `llama`, `t5`, `bert` and the rows of `data/glue/sst2`."""
    from tiny_runs import FAMILIES, save_data, save_model

    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        save_model(family, folder / family)
    save_data(folder / "data" / "glue" / "sst2")
    return folder


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Leaves out the report and its figures, which take a third of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ept.runs.train.write_report", lambda *arguments, **options: None)
        yield
