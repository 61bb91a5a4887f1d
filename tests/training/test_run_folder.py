"""Which folders are refused, which checkpoints count, and what survives a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ept.run_config import RunConfig, load_run_config
from ept.run_folder import CHECKPOINT_FILES, MetricsLog, RunFolder, write_atomically

CONFIG = RunConfig()


def checkpoint(folder: Path, step: int, missing: str | None = None, state: str | None = None) -> Path:
    made = folder / "checkpoints" / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in (*CHECKPOINT_FILES, "rng_state.pth"):
        if name != missing:
            (made / name).write_text("{}", encoding="utf-8")
    if missing != "trainer_state.json":
        text = json.dumps({"global_step": step}) if state is None else state
        (made / "trainer_state.json").write_text(text, encoding="utf-8")
    return made


def test_a_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    folder = RunFolder(tmp_path)
    folder.check(CONFIG, resume=False, overwrite=False)
    folder.begin(CONFIG, resume=False)
    with pytest.raises(FileExistsError, match="already holds a run: --resume continues it, --overwrite deletes it"):
        folder.check(CONFIG, resume=False, overwrite=False)
    folder.check(CONFIG, resume=False, overwrite=True)
    folder.begin(CONFIG, resume=False)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG, resume=False)
    with pytest.raises(ValueError, match="--resume and --overwrite exclude each other"):
        folder.check(CONFIG, resume=True, overwrite=True)
    changed = load_run_config(None, ["training.batch_size=3", "output_dir=elsewhere"])
    with pytest.raises(ValueError, match=r"differs in training\.batch_size \(was 16, now 3\)\. Resume without"):
        folder.check(changed, resume=True, overwrite=False)
    folder.results.write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is finished"):
        folder.check(CONFIG, resume=True, overwrite=False)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(file).check(CONFIG, resume=False, overwrite=False)


@pytest.mark.parametrize("missing", CHECKPOINT_FILES)
def test_half_written_checkpoints_are_passed_over(tmp_path: Path, missing: str) -> None:
    whole = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, missing=missing)
    checkpoint(tmp_path, 11, state='{"global_st')
    checkpoint(tmp_path, 12, state='{"global_step": 8}')
    assert RunFolder(tmp_path).last_checkpoint() == whole


def test_no_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).last_checkpoint() is None


def test_metrics_survive_a_cut_and_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    for step in (1, 2, 3, 4):
        log.append({"step": step, "loss": 1.0})
    with log.file.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert [event["step"] for event in log.read()] == [1, 2, 3, 4]
    log.keep_until(2)
    log.append({"step": 3, "loss": 0.5})
    assert [(event["step"], event["loss"]) for event in log.read()] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "1")
    write_atomically(tmp_path / "a.json", "2")
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [("a.json", "2")]
