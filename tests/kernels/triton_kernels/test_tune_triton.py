"""The tuner end to end on every kernel, at tiny sizes."""

from __future__ import annotations

import sys

import pytest

from ept_kernels import launch
from ept_kernels.dev import tune
from ept_kernels.dev.tunables import tunables

REDUCED = tunables(reduced=True)


@pytest.mark.parametrize("tunable", REDUCED, ids=[f"{t.kernel} {t.size}" for t in REDUCED])
def test_every_candidate_is_measured_through_the_launcher(tunable, device, monkeypatch):
    asked = set()
    config_for = launch.config_for

    def spy(kernel, size, *rest, **options):
        asked.add((kernel, size if isinstance(size, tuple) else (size,)))
        return config_for(kernel, size, *rest, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("ept_kernels") and getattr(module, "config_for", None) is config_for:
            monkeypatch.setattr(module, "config_for", spy)
    row = tune.tune(tunable, device)
    assert (tunable.kernel, tunable.size) in asked
    assert row["tried"] == len(tunable.candidates)
    # At such sizes a GPU's assembler spills two registers of some; no other reason to refuse one is right.
    assert [reason for reason in row["refused"].values() if "spills" not in reason] == []
    assert set(row["config"]) == set(tunable.default)
