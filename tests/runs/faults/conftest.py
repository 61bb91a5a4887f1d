"""Real processes of `ept`, and the run that nothing interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks, Whole
from tiny_runs import run_config


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("output"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, forks: Forks, models: dict[str, Path], data: Path) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    whole = Whole(folder / "run", ["train", "--config", str(folder / "run.yaml"), "--output"])
    steps = (f"training.max_steps={whole.steps}", f"training.eval_steps={whole.every}", "training.logging_steps=3")
    (folder / "run.yaml").write_text(run_config(models["llama"], data, None, *steps).to_yaml(), encoding="utf-8")
    code, said = forks.run(*whole.command, whole.folder)
    assert code == 0, said
    return whole
