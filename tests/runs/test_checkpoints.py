"""Folders of runs: which are refused, which checkpoints count after a crash, and which ones are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ept.runs.config import RunConfig, load_run_config
from ept.runs.failures import writing
from ept.runs.folder import (
    MAY_CHANGE,
    NEEDED,
    SEAL,
    MetricsLog,
    RunFolder,
    checkpoint_folders,
    delete_surplus,
    is_whole,
    read_seal,
    seal,
)
from ept.utils.files import write_atomically

CONFIG = RunConfig()
FILES = (*NEEDED, "rng_state.pth", "default/more.bin")


def write(checkpoint: Path, *without: str) -> Path:
    for name in FILES:
        if name not in without:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_text(f"the content of {name}", encoding="utf-8")
    return checkpoint


def save(run: Path, step: int, limit: int = 2, best: int | None = None) -> Path:
    checkpoint = write(run / "checkpoints" / f"checkpoint-{step}")
    seal(checkpoint)
    delete_surplus(checkpoint.parent, checkpoint, limit, best)
    return checkpoint


def last_whole(run: Path) -> Path | None:
    return RunFolder(run).last_checkpoint()


def steps(run: Path) -> set[int]:
    return set(checkpoint_folders(run / "checkpoints"))


DAMAGE = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeros": lambda file: file.write_bytes(bytes(len(file.read_bytes()))),  # sizes reached the disk, contents did not
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-3] + b"\x01" + file.read_bytes()[-2:]),
}


@pytest.mark.parametrize("name", [*FILES, SEAL])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: Any) -> None:
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    assert last_whole(tmp_path) == newer
    damage(newer / name)
    assert not is_whole(newer)
    assert last_whole(tmp_path) == older


@pytest.mark.parametrize("missing", NEEDED)
def test_a_checkpoint_sealed_without_a_file_is_none(tmp_path: Path, missing: str) -> None:
    checkpoint = write(tmp_path / "checkpoint-3", missing)
    seal(checkpoint)
    assert not is_whole(checkpoint)


def test_a_checkpoint_under_another_steps_name_is_none(tmp_path: Path) -> None:
    save(tmp_path, 3).rename(tmp_path / "checkpoints" / "checkpoint-4")
    assert last_whole(tmp_path) is None
    assert last_whole(tmp_path / "nothing") is None


def test_a_checkpoint_counts_only_once_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file and folder is synced before the seal takes its name, and that is synced last."""
    synced: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        synced.append(f"-> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(tmp_path, 7)
    sealed = synced.index(f"-> {SEAL}")
    folder = "checkpoints/checkpoint-7"
    names = {f"{folder}/{name}" for name in (*FILES, "default", f".{SEAL}.{os.getpid()}.tmp")}
    assert names | {folder} == set(synced[:sealed])
    assert synced[sealed + 1 :] == [folder, "checkpoints"]


def test_while_a_checkpoint_is_written_the_one_before_counts(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    checkpoint = write(tmp_path / "checkpoints" / "checkpoint-2")
    assert RunFolder(tmp_path).unfinished_checkpoint() == checkpoint
    assert last_whole(tmp_path) == first
    assert save(tmp_path, 2, limit=1) == checkpoint == last_whole(tmp_path)
    assert RunFolder(tmp_path).unfinished_checkpoint() is None
    assert not first.exists()


@pytest.mark.parametrize("rank, kind, left", [(0, OSError, {1}), (1, RuntimeError, {1, 2})])
def test_a_checkpoint_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, rank: int, kind: type[Exception], left: set[int]
) -> None:
    """Rank 0, which writes it, deletes it and names it."""
    first = save(tmp_path, 1)

    def fail() -> None:
        with writing(RunFolder(tmp_path), is_rank_zero=rank == 0):
            write(tmp_path / "checkpoints" / "checkpoint-2")
            raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(kind, match="unexpected pos") as error:
        fail()
    assert getattr(error.value, "filename", None) == (str(tmp_path / "checkpoints/checkpoint-2") if rank == 0 else None)
    assert steps(tmp_path) == left
    assert is_whole(first)


def test_a_resumed_run_has_nothing_left_of_half_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint = folder.checkpoints / "checkpoint-2"
    (checkpoint / "old").mkdir(parents=True)
    half = tmp_path / ".results.json.123.tmp"
    half.touch()
    assert folder.begin(RunConfig(), resume=True) is None
    assert not checkpoint.exists()
    assert not half.exists()
    seal(write(checkpoint), loss_since=1)
    assert read_seal(checkpoint)["loss_since"] == 1


@pytest.mark.parametrize("limit, best, kept", [
    (1, None, {5}), (1, 5, {5}), (1, 2, {2, 5}), (2, 2, {2, 5}), (2, None, {4, 5}), (3, 1, {1, 4, 5}),
    (9, None, {1, 2, 3, 4, 5}),
])  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path: Path, limit: int, best: int | None, kept: set[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, limit=9)
    save(tmp_path, 5, limit, best)
    assert steps(tmp_path) == kept


def test_a_run_that_goes_on_keeps_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint = write(tmp_path / "checkpoints" / f"checkpoint-{step}")
        (checkpoint / "trainer_state.json").write_text('{"best_global_step": 1}', encoding="utf-8")
        seal(checkpoint)
    config = load_run_config(None, ["training.save_total_limit=1"])
    assert RunFolder(tmp_path).begin(config, resume=True) == checkpoint
    assert steps(tmp_path) == {1, 3}


def test_halves_and_what_lies_ahead_are_deleted_with_the_next_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 8) / "optimizer.pt").unlink()  # the run went on from 1
    write(tmp_path / "checkpoints" / "checkpoint-2")  # without a seal
    (tmp_path / "checkpoints" / "checkpoint-notes").mkdir()
    save(tmp_path, 3, limit=5)
    assert steps(tmp_path) == {1, 3}
    assert (tmp_path / "checkpoints" / "checkpoint-notes").exists()


def test_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "1")
    write_atomically(file, lambda path: path.write_bytes(b"2"))
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("a.json", "2")]


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


def test_a_run_is_resumed_however_its_paths_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    folder = RunFolder(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "here")
    folder.begin(load_run_config(None, ["model.name_or_path=model"]), resume=False)
    monkeypatch.chdir(tmp_path / "there")
    for same in ("../here/model", tmp_path / "here" / "model", tmp_path / "link" / "model"):
        folder.check(load_run_config(None, [f"model.name_or_path={same}"]), resume=True, overwrite=False)
    with pytest.raises(ValueError, match=r"name_or_path \(was '.*/here/model', now '.*/there/model'\)"):
        folder.check(load_run_config(None, ["model.name_or_path=model"]), resume=True, overwrite=False)


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
    """Otherwise a run that ran out of memory could not be resumed with lower needs."""
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
