"""The tuner on a toy operator: what may win, what is refused and why, and the file it writes."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from ept_kernels import launch
from ept_kernels.dev import tune
from ept_kernels.dev.tunables import Tunable, tunables
from ept_kernels.four_bit import paths
from ept_kernels.problem import Problem

CPU = torch.device("cpu")
SLOW = 0.004  # seconds


def fake_kernel(n_spills: int) -> Any:
    """Makes a kernel as `launch` indexes it with a grid and calls it."""
    return {(1,): lambda **meta: SimpleNamespace(n_spills=n_spills, metadata=SimpleNamespace(name="toy"))}


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Twice `x`, faster or slower or wrong as its configuration says."""
    kind = launch.config_for("toy", x.shape[0], x.device, {"kind": 0})["kind"]
    launch.launch(fake_kernel(3 if kind == 2 or (kind == 6 and len(x) == 5) else 0), (1,))
    if kind == 3:
        raise OutOfResources(300_000, 232_448, "shared memory")
    if kind == 0:
        time.sleep(SLOW)
    out = torch.empty_like(x)
    out[: -1 if kind == 4 else None] = 2 * x[: -1 if kind == 4 else None]
    return out + (1e-3 if kind == 5 else 0)


@dataclass(frozen=True)
class Doubling(Problem):
    """Doubles eight numbers; the result is off by `off`."""

    size: int = 8
    off: float = 0.0
    exact: bool = False

    def inputs(self, device: Any = "cpu", seed: int = 0) -> tuple[Any, ...]:
        return (torch.ones(self.size, device=device) + seed,)

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (2 * x.double() + self.off,)

    def tolerance(self, dtype: torch.dtype) -> float:
        return 0.0 if self.exact else super().tolerance(dtype)


def toy(*kinds: int, **problem: Any) -> Tunable:
    return Tunable("toy", (8,), {"kind": 0}, [{"kind": kind} for kind in kinds], Doubling(**problem))


@pytest.fixture(autouse=True)
def launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "launcher_of", lambda operator: doubled)


def test_the_fastest_right_candidate_wins():
    row = tune.tune(toy(1), CPU)
    assert row["config"] == {"kind": 1}
    assert row["median_us"] < row["default_us"]
    assert row["default_us"] >= 1e6 * SLOW


@pytest.mark.parametrize(
    "kind, reason",
    [(2, "spills 3"), (3, "out of resource: shared memory"), (4, "differs .* by nan"), (5, "differs .* by 0.001")],
    ids=["spill", "too large", "leaves memory unwritten", "wrong"],
)
def test_a_bad_candidate_is_refused_however_fast(kind, reason):
    row = tune.tune(toy(kind), CPU)
    assert row["config"] == {"kind": 0}
    ((config, why),) = row["refused"].items()
    assert json.loads(config) == {"kind": kind}
    assert re.search(reason, why), why


@pytest.fixture
def microseconds(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Sets how long a call takes by the `kind` that is tried, in place of a clock."""
    times: dict[int, float] = {}
    monkeypatch.setattr(tune, "_microseconds", lambda *_: times[launch._State.tried["toy"]["kind"]])
    return times


def test_a_winner_has_to_serve_its_variants(microseconds):
    """The second best wins if the best fails on other inputs of its configuration."""
    microseconds.update({0: 100.0, 1: 10.0, 6: 5.0})
    row = tune.tune(replace(toy(1, 6), variants=[Doubling(size=5)]), CPU)
    assert (row["config"], row["median_us"]) == ({"kind": 1}, 10.0)
    ((config, why),) = row["refused"].items()
    assert json.loads(config) == {"kind": 6}
    assert "spills 3" in why


@pytest.mark.parametrize("faster, expected", [(1.0, 0), (0.985, 0), (0.97, 1)])
def test_a_gain_within_the_noise_keeps_the_heuristic(faster, expected, microseconds):
    microseconds.update({0: 100.0, 1: 100.0 * faster})
    assert tune.tune(toy(1), CPU)["config"] == {"kind": expected}


def test_a_heuristic_that_is_wrong_stops_the_tuner():
    with pytest.raises(RuntimeError, match=r"toy at 8: the heuristic's configuration: .* spills"):
        tune.tune(replace(toy(1), default={"kind": 2}), CPU)


def test_bits_are_compared_where_nothing_is_tolerated():
    with pytest.raises(RuntimeError, match="0 is allowed"):
        tune.tune(toy(1, off=1e-6, exact=True), CPU)


def test_the_file_is_added_to_and_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, row = tmp_path / "Some_GPU.json", tune.tune(toy(1), CPU)
    monkeypatch.setattr(launch, "config_file", lambda device: path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    chosen = launch.cached_choice(lambda: launch.config_for("toy", 9, torch.device("cuda"), {"kind": 0}))
    for change, command, kind in (
        ({}, "first", 1),
        ({"kernel": "other"}, "other", 1),
        ({"config": {"kind": 7}}, "again", 7),
    ):
        tune.write(path, {**row, **change}, gpu, command)
        assert chosen() == {"kind": kind}, command
    assert launch.load_configs(path) == {"toy": {(8,): {"kind": 7}}, "other": {(8,): {"kind": 1}}}
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["device"], content["target"]) == ("Some GPU", "sm_90")
    assert [row["measured_with"]["command"] for row in content["measurements"]] == ["other", "again"]
    assert content["measurements"][0]["measured_with"]["torch"] == torch.__version__
    assert "bitsandbytes" in content["measurements"][0]["measured_with"]
    launch.forget_measured()


def test_a_damaged_file_is_not_written_over(tmp_path: Path):
    path = tmp_path / "Some_GPU.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        tune.write(path, {}, torch.device("cuda", 0), "tune")
    assert path.read_text(encoding="utf-8") == "{"


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that the command finds, and the file of its configurations; nothing runs on it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Some GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it takes long
    return tmp_path / "Some_GPU_1.json"


def test_the_command_writes_after_each_kernel(accelerator, monkeypatch, capsys):
    def tuned(tunable: Tunable, device: torch.device) -> dict[str, Any]:
        measured = launch.load_configs(accelerator) if accelerator.is_file() else {}
        row = {"kernel": tunable.kernel, "size": tunable.key, "config": {"written": sum(map(len, measured.values()))}}
        return {**row, "median_us": 1.0, "default_us": 2.0, "tried": 3, "refused": {"{}": "spills"}}

    monkeypatch.setattr(tune, "tune", tuned)
    tune.main(["--kernels", "joint_prompt_rows,joint_prompt_sides"])
    assert launch.load_configs(accelerator) == {
        "joint_prompt_rows": {(768,): {"written": 0}, (4096,): {"written": 2}},
        "joint_prompt_sides": {(768,): {"written": 1}, (4096,): {"written": 3}},
    }
    printed = capsys.readouterr().out
    assert "joint_prompt_rows 768: 1.0 us (2.0 us by the heuristic)" in printed
    assert "refused {}: spills" in printed


def test_what_the_command_refuses(request, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(SystemExit, match="no accelerator was found"):
        tune.main([])
    request.getfixturevalue("accelerator")
    with pytest.raises(SystemExit, match=r"known are .*prompted_embedding/"):
        tune.main(["--kernels", "embeding"])


@pytest.mark.parametrize("is_there", [False, True])
def test_a_path_is_measured_where_there_is_another_and_bitsandbytes_only_where_it_is_there(is_there, monkeypatch):
    monkeypatch.setattr(paths, "has_bitsandbytes", lambda: is_there)
    found = [t for t in tunables() if "path" in t.kernel]
    assert all(len(t.candidates) > 1 and t.default in t.candidates for t in found)
    assert any({"PATH": paths.BITSANDBYTES} in t.candidates for t in found) == is_there
    few = {t.size[0]: t.default["PATH"] for t in found if t.kernel.endswith("16-bit")}
    assert few[1] == (paths.BITSANDBYTES if is_there else paths.FUSED)
    assert any(t.kernel.endswith("32-bit") for t in found) == is_there  # of float32 there is no fused product


def test_what_is_tunable_is_unique_bounded_and_on_the_launchers_own_keys():
    found = tunables()
    assert len({(t.kernel, t.size) for t in found}) == len(found)
    for tunable in [*found, *tunables(reduced=True)]:
        assert 1 <= len(tunable.candidates) <= 64, tunable.kernel
        assert all(set(c) <= set(tunable.default) for c in tunable.candidates), tunable.kernel
        if "." not in tunable.kernel:  # a kernel, not a measured number
            assert "num_warps" in tunable.default
