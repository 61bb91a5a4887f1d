"""Whether two runs have left the same."""

from __future__ import annotations

import json
from pathlib import Path

from run_checks import events

from ept.runs.folder import checkpoint_folders, is_whole

OTHERWISE = {"train_seconds", "step_time_ms", "peak_memory_bytes", "config"}  # of two runs with the same results
WEIGHTS_AND_STATES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def assert_same_run(run: Path, whole: Path) -> None:
    """All that two runs leave is the same, bit for bit, the clock and the memory apart."""
    assert content(run / "adapter") == content(whole / "adapter")
    assert events(run) == events(whole)
    results, expected = (json.loads((folder / "results.json").read_text("utf-8")) for folder in (run, whole))
    assert {k: results[k] for k in results.keys() - OTHERWISE} == {k: expected[k] for k in expected.keys() - OTHERWISE}
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    kept, others = (checkpoint_folders(folder / "checkpoints") for folder in (run, whole))
    assert kept.keys() == others.keys()
    for step, path in kept.items():
        assert is_whole(path)
        random = sorted(state.name for state in others[step].glob("rng_state*.pth"))  # one of each process
        assert random
        for name in (*WEIGHTS_AND_STATES, *random):
            assert (path / name).read_bytes() == (others[step] / name).read_bytes(), f"{name} of step {step} differs"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
