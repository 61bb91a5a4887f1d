"""Which folders are refused, which checkpoints count, and what survives a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from ept.runs.config import RunConfig, load_run_config
from ept.runs.folder import MAY_CHANGE, MetricsLog, RunFolder

CONFIG = RunConfig()


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


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    """Otherwise a run that found no memory could not be resumed with less need of it."""
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG, resume=False)
    other = {"training.gradient_checkpointing": True, "training.eval_batch_size": 1, "training.save_total_limit": 9}
    assert set(other) == set(MAY_CHANGE)
    changed = load_run_config(None, [f"{key}={str(value).lower()}" for key, value in other.items()])
    folder.check(changed, resume=True, overwrite=False)
    folder.begin(changed, resume=True)
    assert load_run_config(folder.config).training.eval_batch_size == 1


def test_an_overwritten_run_cut_short_leaves_no_checkpoint_to_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG, resume=False)
    for path in (folder.checkpoints, folder.adapter):
        path.mkdir()
    folder.metrics.touch()
    other = load_run_config(None, ["training.batch_size=3"])
    unlink = Path.unlink

    def cut_short(path: Path, missing_ok: bool = False) -> None:
        if path == folder.config:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut_short)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(other, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(ValueError, match=r"differs in training\.batch_size"):
        folder.check(other, resume=True, overwrite=False)
