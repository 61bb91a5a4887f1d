"""Which checkpoints count, whatever a crash has left of their files, and which ones are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ept.runs.checkpoints import NEEDED, SEAL, being_saved, checkpoint_folders, is_whole, last_whole, read_seal, seal
from ept.utils.files import write_atomically

FILES = (*NEEDED, "rng_state.pth", "default/more.bin")


def write(checkpoint: Path, *without: str) -> Path:
    for name in FILES:
        if name not in without:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_text(f"the content of {name}", encoding="utf-8")
    return checkpoint


def save(folder: Path, step: int, limit: int = 2, best: int | None = None, **kept: Any) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    with being_saved(checkpoint, limit=limit, best=best, **kept):
        write(checkpoint)
    return checkpoint


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
    save(tmp_path, 3).rename(tmp_path / "checkpoint-4")
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
    folder = "checkpoint-7"
    assert {f"{folder}/{name}" for name in FILES} | {folder, f"{folder}/default", f"{folder}/{SEAL}.tmp"} == set(
        synced[:sealed]
    )
    assert synced[sealed + 1 :] == [folder, "."]


def test_while_a_checkpoint_is_written_the_one_before_counts(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoint-2"
    with being_saved(checkpoint, limit=1, best=None):
        write(checkpoint)
        assert last_whole(tmp_path) == first
    assert last_whole(tmp_path) == checkpoint
    assert not first.exists()


def test_a_checkpoint_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoint-2"

    def fail() -> None:
        with being_saved(checkpoint, limit=1, best=None):
            write(checkpoint)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == [first]
    assert is_whole(first)


def test_half_a_checkpoint_is_replaced_with_nothing_of_it_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2" / "old").mkdir(parents=True)
    assert not (save(tmp_path, 2, loss_since=1) / "old").exists()
    assert read_seal(tmp_path / "checkpoint-2")["loss_since"] == 1


@pytest.mark.parametrize("limit, best, kept", [
    (1, None, {5}), (1, 5, {5}), (1, 2, {2, 5}), (2, 2, {2, 5}), (2, None, {4, 5}), (3, 1, {1, 4, 5}),
    (9, None, {1, 2, 3, 4, 5}),
])  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path: Path, limit: int, best: int | None, kept: set[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, limit=9)
    save(tmp_path, 5, limit, best)
    assert checkpoint_folders(tmp_path).keys() == kept


def test_halves_and_what_lies_ahead_are_deleted_with_the_next_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write(tmp_path / "checkpoint-2")  # without a seal
    (save(tmp_path, 8) / "optimizer.pt").unlink()  # the run went on from 1
    (tmp_path / "checkpoint-notes").mkdir()
    save(tmp_path, 3, limit=5)
    assert checkpoint_folders(tmp_path).keys() == {1, 3}
    assert (tmp_path / "checkpoint-notes").exists()


def test_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "1")
    write_atomically(file, "2")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("a.json", "2")]
