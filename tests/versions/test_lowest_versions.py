"""The lowest versions that `make nightly` installs are those that pyproject.toml promises to support."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def promised() -> dict[str, Version]:
    """The lower bound of every dependency that has one."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    requirements = [Requirement(quoted[1:-1]) for quoted in re.findall(r"'[^']+'|\"[^\"]+\"(?=,)", listed[1])]
    return {r.name: Version(s.version) for r in requirements for s in r.specifier if s.operator == ">="}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


def test_every_lower_bound_is_pinned_to_its_first_release():
    bounds, pins = promised(), pinned()
    assert bounds.keys() == pins.keys()
    assert len(bounds) >= 4
    for name, bound in bounds.items():
        assert pins[name].release[:2] == bound.release[:2], f"{name}: {pins[name]} is not the first of >={bound}"


@pytest.mark.skipif("EPT_LOWEST" not in os.environ, reason="`make lowest` runs it, with other versions on the path")
@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_make_lowest_runs_with_the_lowest(name):
    assert Version(metadata.version(name)) == pinned()[name]
    assert Version(__import__(name).__version__) == pinned()[name]
