"""`ept train` in two CPU processes, started by torchrun and by accelerate, against one with as large a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_helpers import SIZES
from run_checks import events, weights
from tiny_models import make_model
from tiny_runs import run_config, save_data

from ept.compare.config import ComparisonConfig
from ept.compare.plan import compare
from ept.runs.folder import RunFolder
from ept.runs.loading import default_device
from ept.runs.predict import Predictor
from ept.runs.processes import Processes
from ept.runs.train import train
from ept.runs.trainer import FILLER_LABELS, SharedBatches, collate_share

HERE = Path(__file__).resolve().parent
# AdamW divides by the gradient's size: where that is small by cancellation, a step of full length is mostly rounding.
SHORT = (
    *("training.eval_batch_size=5", "training.eval_steps=5", "training.logging_steps=5"),
    *("training.learning_rate=0.01", "training.low_rank_learning_rate=0.003"),
)
GROUPED = ("training.group_by_length=true", "training.early_stopping_patience=2")
# of each run: model, settings, rows of an optimiser step. 97 rows: the last step of an epoch of 8 has one, for one
# of the two processes
RUNS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "grouped": ("llama", (*SHORT, "training.max_steps=30", *GROUPED), 8),
    "resumed": ("t5", (*SHORT, "training.max_steps=10", "training.gradient_accumulation_steps=2"), 16),
    "broken": ("bert", (*SHORT, "training.max_steps=10"), 8),
    "plain": ("bert", (*SHORT, "training.max_steps=15", "training.weight_decay=0.01"), 8),
}


def settings(name: str, processes: int) -> list[str]:
    _, given, rows = RUNS[name]
    accumulated = 2 if "training.gradient_accumulation_steps=2" in given else 1
    return [*given, f"training.batch_size={rows // accumulated // processes}"]


def run_launcher(*words: str, expected: int | None) -> tuple[subprocess.CompletedProcess[str], float]:
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "model", *(path for path in sys.path if path))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "EPT_DEBUG": ""}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert expected is None or done.returncode == expected, done.stderr
    return done, time.monotonic() - start


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("rows"), rows=97)


@pytest.fixture(scope="module")
def alone(no_curves: None, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Path) -> Path:
    """Carries out the same runs in this process alone; `scored.json` has the texts that the grouped one scored."""
    folder = tmp_path_factory.mktemp("alone")
    scored: list[list[int]] = []
    score = Predictor.predict_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Predictor, "predict_batch", lambda self, inputs: scored.extend(map(list, inputs)) or score(self, inputs)
        )
        train(run_config(models["llama"], rows, folder / "grouped", *settings("grouped", 1)))
    (folder / "scored.json").write_text(json.dumps(scored), encoding="utf-8")
    for name in ("resumed", "plain"):
        train(run_config(models[RUNS[name][0]], rows, folder / name, *settings(name, 1)))
    return folder


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Path) -> Path:
    """Carries out processes_driver.py in two processes; `launcher.json` in the folder says how they ended."""
    folder = tmp_path_factory.mktemp("torchrun")
    plan = {
        name: ([str(models[RUNS[name][0]]), str(rows), str(folder / name)], settings(name, 2))
        for name in ("grouped", "resumed", "broken")
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    make_model("llama", **SIZES["llama"]).save_pretrained(folder / "four_bit")
    driver = str(HERE / "processes_driver.py")
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", driver, str(folder))
    done, seconds = run_launcher(*words, expected=None)
    ending = {"code": done.returncode, "output": done.stdout, "errors": done.stderr, "seconds": seconds}
    (folder / "launcher.json").write_text(json.dumps(ending), encoding="utf-8")
    return folder


def seen(folder: Path) -> list[dict[str, Any]]:
    """Reads what each process of the launch noted."""
    files = [folder / f"seen_{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), json.loads((folder / "launcher.json").read_text())["errors"]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def assert_close_weights(one: Path, two: Path) -> None:
    """Compares to 1e-6 of the largest entry of each parameter, or of 1."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    apart = {name: float((first[name] - second[name]).abs().max()) for name in first}
    size = {name: max(1.0, float(first[name].abs().max())) for name in first}
    assert all(apart[name] <= 1e-6 * size[name] for name in apart), apart


def assert_same_run(one: Path, two: Path) -> None:
    """Compares checkpoints, log and results, up to rounding of float32."""
    names = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (two / "checkpoints").iterdir())
    assert names
    for name in names:
        assert_close_weights(one / "checkpoints" / name, two / "checkpoints" / name)
    assert_close_weights(one / "adapter", two / "adapter")
    first, second = events(one), events(two)
    assert [event["step"] for event in first] == [event["step"] for event in second]
    for here, there in zip(first, second, strict=True):
        assert here.keys() == there.keys()
        assert here.get("before") == there.get("before")
        numbers = [{key: value for key, value in event.items() if key != "before"} for event in (here, there)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4), here["step"]
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (one, two)]
    for key in ("score", "score_before", "steps", "best_step", "best_validation", "test_metrics", "global_batch_size"):
        assert results[0][key] == results[1][key], key
    assert [found["processes"] for found in results] == [1, 2]


@pytest.mark.slow
def test_two_processes_make_the_weights_of_one(alone: Path, torchrun: Path) -> None:
    """Rows grouped by length, an epoch's last step of one row, and an early stop."""
    first, second = seen(torchrun)
    assert_same_run(alone / "grouped", torchrun / "grouped")
    assert {**first, "scored": None} == {**second, "scored": None}  # they stop at one step, with the same weights
    assert first["stopped_at"] < 30  # by the early stop
    assert first["stopped_at"] > 13  # after an epoch's last step
    assert (first["processes"], first["global_batch_size"]) == (2, 8)
    assert not first["find_unused"]


@pytest.mark.slow
def test_every_row_is_scored_once(alone: Path, torchrun: Path) -> None:
    """By one of the two: 24 validation rows in batches of 5 leave one process three batches, the last of them short."""
    whole = json.loads((alone / "scored.json").read_text(encoding="utf-8"))
    first, second = (process["scored"] for process in seen(torchrun))
    assert len(first) + len(second) == len(whole)
    assert Counter(map(tuple, first)) + Counter(map(tuple, second)) == Counter(map(tuple, whole))
    assert min(len(first), len(second)) > len(whole) / 3


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes(alone: Path, torchrun: Path) -> None:
    """With accumulated steps."""
    seen(torchrun)
    assert all((torchrun / f"killed_{rank}").exists() for rank in (0, 1))
    assert_same_run(alone / "resumed", torchrun / "resumed")


@pytest.mark.slow
def test_another_number_of_processes_cannot_resume(
    torchrun: Path, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    seen(torchrun)
    run = tmp_path / "run"
    (torchrun / "resumed" / "results.json").rename(torchrun / "resumed" / "kept.json")
    try:
        config = run_config(models["t5"], rows, run, *settings("resumed", 2))
        with pytest.raises(ValueError, match="checkpoint-10 is from a run in 2 processes, but this one has 1: start 2"):
            RunFolder(torchrun / "resumed").check(config, resume=True, overwrite=False)
        RunFolder(torchrun / "resumed").check(config, resume=True, overwrite=False, world_size=2)
    finally:
        (torchrun / "resumed" / "kept.json").rename(torchrun / "resumed" / "results.json")


@pytest.mark.slow
def test_4bit_layers_sharded_among_two_processes(torchrun: Path) -> None:
    """FSDP2 shards weights stored in the dtype of the others; our layers compute with what it puts together."""
    seen(torchrun)
    for rank in (0, 1):
        found = json.loads((torchrun / f"sharded_{rank}.json").read_text(encoding="utf-8"))
        assert found.keys() == {"torch.float32", "torch.bfloat16"}
        for dtype, there in found.items():
            assert there["dtypes"] == [dtype]
            assert len(there["kept"]) >= 14
            assert set(there["kept"]) == {0.5}
            assert max(there["apart"].values()) < 1e-5


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(torchrun: Path) -> None:
    ending = json.loads((torchrun / "launcher.json").read_text(encoding="utf-8"))
    assert ending["code"] != 0
    assert ending["errors"].count("error on rank 1: it breaks here  (EPT_DEBUG=1 shows where)") == 1
    assert "ValueError: it breaks here" in ending["errors"].partition("Root Cause")[2]  # the launcher's report
    assert not (torchrun / "broken" / "results.json").exists()
    assert ending["seconds"] < 400  # gloo alone would wait for half an hour


@pytest.mark.slow
def test_accelerate_launch(alone: Path, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """The command line as a user starts it: rank 0 alone prints and writes."""
    config = run_config(models["bert"], rows, None, *settings("plain", 2))
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
    quiet = ("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
    command = ("-m", "ept", "train", "--json", "--config", str(file), "--output", str(tmp_path / "run"))
    done, _ = run_launcher(*launcher, *quiet, *command, expected=0)
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert_same_run(alone / "plain", tmp_path / "run")


@dataclass(frozen=True)
class OneOfTwo(Processes):
    """Rank 0 or 1 of two, the other of which has or has not failed."""

    world_size: int = 2
    other_failed: bool = False

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other_failed] if self.rank == 0 else [self.other_failed, value]


@pytest.mark.parametrize("rank, fails, other_failed, expected", [
    (0, True, False, ValueError), (0, True, True, ValueError), (0, False, True, SystemExit),
    (1, True, False, ValueError), (1, True, True, SystemExit), (1, False, True, SystemExit),
])  # fmt: skip
def test_the_first_rank_that_fails_reports_and_the_others_exit(
    rank: int, fails: bool, other_failed: bool, expected: type[BaseException]
) -> None:
    def make() -> int:
        if fails:
            raise ValueError
        return 3

    with pytest.raises(expected):
        OneOfTwo(rank, other_failed=other_failed).together(make)
    assert Processes().together(lambda: 3) == OneOfTwo(rank).together(lambda: 3) == 3


def test_shares_of_batches_are_the_batches_of_one_process() -> None:
    sampler = [5, 3, 8, 1, 7, 2, 6, 0, 4]  # nine rows, in batches of four
    shares = [list(SharedBatches(sampler, 2, Processes(rank, 2))) for rank in (0, 1)]
    assert shares == [[[5, 8], [7, 6], [4]], [[3, 1], [2, 0], []]]
    assert len(SharedBatches(sampler, 2, Processes(1, 2))) == 3


def test_a_share_without_rows_is_a_batch_that_does_not_count() -> None:
    def collate(rows: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([row["ids"] for row in rows]), "labels": torch.tensor([r["l"] for r in rows])}

    filler = {"ids": [1, 2], "l": 3}
    assert FILLER_LABELS not in collate_share(collate, filler, [{"ids": [4, 5], "l": 6}])
    batch = collate_share(collate, filler, [])
    assert batch["labels"].tolist() == [-100]
    assert batch[FILLER_LABELS].tolist() == [3]
    assert batch["input_ids"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "a whole model in each process, but FSDP splits one"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "leave DeepSpeed out of the launcher's"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "but started one: use --multi_gpu"),
    ],
    ids=["fsdp", "deepspeed", "accelerate-cpu"],
)
def test_launches_that_are_refused(
    environment: dict[str, str], message: str, models: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(run_config(models["bert"], rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_one_process(monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="is a single process, but a launcher has started several: start it without"):
        compare(ComparisonConfig())


@pytest.mark.parametrize(
    "several, devices, index",
    [("1", 4, None), ("4", 4, 3), ("4", 1, 0)],
    ids=["alone", "several", "each is shown its own"],
)
def test_the_device_of_a_process(several: str, devices: int, index: int | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setenv("WORLD_SIZE", several)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", index)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == torch.device("cpu")
