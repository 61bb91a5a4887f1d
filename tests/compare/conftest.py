"""Tiny models and separable data, as the training tests use them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from tiny_runs import FAMILIES, save_data, save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `llama`, `t5`, `bert` and the rows of `data/glue/sst2`."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        save_model(family, folder / family)
    save_data(folder / "data" / "glue" / "sst2")
    return folder
