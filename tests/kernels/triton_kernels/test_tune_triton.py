"""The tuner end to end on every kernel, at tiny sizes."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import INTERPRETED

from ept_kernels import launch
from ept_kernels.dev import tune

REDUCED = tune.tunables(reduced=True)


@pytest.mark.parametrize("tunable", REDUCED, ids=[f"{t.kernel} {t.size}" for t in REDUCED])
def test_every_candidate_is_measured_through_the_launcher(tunable, device, monkeypatch):
    asked = set()
    config_for = launch.config_for

    def spy(kernel, size, *rest):
        asked.add((kernel, size if isinstance(size, tuple) else (size,)))
        return config_for(kernel, size, *rest)

    for name, module in list(sys.modules.items()):
        if name.startswith("ept_kernels") and getattr(module, "config_for", None) is config_for:
            monkeypatch.setattr(module, "config_for", spy)
    row = tune.tune(tunable, device, samples=1)
    assert (tunable.kernel, tunable.size) in asked
    assert row["tried"] == len(tunable.candidates)
    assert row["refused"] == {}
    assert set(row["config"]) == set(tunable.default)


def test_the_command_says_that_the_interpreter_measures_nothing(tmp_path, capsys):
    if not INTERPRETED:
        pytest.skip("only under the interpreter")
    path = tmp_path / "out.json"
    tune.main(["--device", "cpu", "--kernels", "reduce,packed", "--samples", "1", "--output", str(path)])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["device"].startswith("cpu, Triton's interpreter")
    assert {kernel.split("/")[0] for kernel in launch.load_configs(path)} == {
        "prompted_embedding_reduce",
        "prompted_embedding_packed",
    }
    assert "say nothing about a GPU" in capsys.readouterr().out
