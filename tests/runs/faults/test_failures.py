"""A full disk, a folder that cannot be written, missing data, NaN, no memory: one clear line each, exit code 1 (2 where
something wrong was given), the last good checkpoint intact, and the run goes on from it once the cause is gone.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Whole
from run_checks import events, losses
from safetensors import SafetensorError
from same_run import WEIGHTS_AND_STATES, content

from ept.runs.config import RunConfig, load_run_config
from ept.runs.failures import check_writable, with_advice, writing
from ept.runs.folder import RunFolder, checkpoint_folders, is_whole
from ept.runs.train import train
from ept.runs.trainer import PromptTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


def one_line(said: str) -> str:
    """Returns the message of a failed command: its last line, and the only one that mentions an error."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("step ")]
    assert [line for line in lines if "rror" in line] == lines[-1:], said
    assert lines[-1].startswith("error: "), said
    return lines[-1]


def goes_on(checkpoint: Path) -> str:
    return f". The last good checkpoint is {checkpoint}; --resume continues from there"


def only_whole(run: Path, checkpoint: Path) -> None:
    assert is_whole(checkpoint)
    assert all(map(is_whole, checkpoint_folders(run / "checkpoints").values())), "half a checkpoint was left"


def test_a_file_that_may_not_grow(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    """As a full disk: real errors of every library that writes, at the first checkpoint after the start."""
    run = tmp_path / "run"
    checkpoint = whole.started(forks, run, step=12)
    largest = max((checkpoint / name).stat().st_size for name in WEIGHTS_AND_STATES)
    code, said = forks.run(*whole.command, run, "--resume", largest_file=largest - 512)
    message = one_line(said)
    assert code == 1
    assert f"error: cannot write {run}/checkpoints/checkpoint-" in message
    assert "MB are free): look for a full disk, a quota, or a file size limit (ulimit -f)" in message
    assert goes_on(checkpoint) in message
    only_whole(run, checkpoint)
    whole.finish(forks, run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 2 MB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = shutil.which("mount")
    made = command and subprocess.run([command, "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if not made or made.returncode:
        pytest.skip("a small file system can be mounted by root only, outside most containers")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_and_a_read_only_one(forks: Forks, whole: Whole, small_disk: Path) -> None:
    run = small_disk / "run"
    checkpoint = whole.started(forks, run, step=12)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        room = shutil.disk_usage(small_disk).free - 16 * 1024  # enough for the log, too little for a checkpoint
        filler.write(bytes(room))
    code, said = forks.run(*whole.command, run, "--resume")
    message = one_line(said)
    assert code == 1
    assert message.startswith(f"error: cannot write {run}/"), message
    assert goes_on(checkpoint) in message
    only_whole(run, checkpoint)

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = content(run)
    code, said = forks.run(*whole.command, run, "--resume")
    assert code == 1
    assert f"cannot write {run}: {run} is not writable: give this user the right to write there" in one_line(said)
    assert content(run) == before

    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    (small_disk / "filler").unlink()
    whole.finish(forks, run)


def test_data_removed_before_the_resume(forks: Forks, whole: Whole, data: Path, tmp_path: Path) -> None:
    copy, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    moved = [*whole.command[:3], "--set", f"data.data_dir={copy}", "--output"]
    checkpoint = Whole(whole.folder, moved).started(forks, run, step=9)
    (copy / "train.jsonl").rename(copy / "elsewhere.jsonl")
    before = content(run)
    code, said = forks.run("train", "--output", run, "--resume")
    assert code == 2
    assert f"{copy} has no train split: it needs train" in one_line(said)
    assert content(run) == before
    assert is_whole(checkpoint)


def test_a_training_that_diverges(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    """Not simulated: with this rate the first steps overflow."""
    run = tmp_path / "run"
    rate = "training.learning_rate=1.0e+38"
    code, said = forks.run(*whole.command[:3], "--set", rate, "--set", "training.warmup_steps=0", "--output", run)
    assert code == 1
    message = one_line(said)
    assert "became nan" in message.lower() or "became inf" in message.lower(), message
    assert "lower training.learning_rate (1e+38) or training.low_rank_learning_rate" in message


def test_a_nan_between_two_checkpoints_keeps_the_first(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step before the checkpoint is still finite, and not logged at that step; the weights show it."""
    config = same_config(whole, tmp_path / "run")
    fail_at(8, monkeypatch, lambda trainer: first_parameter(trainer).fill_(float("nan")))
    message = r"the parameter \S+ became NaN or infinite by step 8: lower training\.learning_rate \(0\.05\)"
    with pytest.raises(FloatingPointError, match=message) as error:
        train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    assert str(error.value).endswith(f". The last good checkpoint is {checkpoint}")
    only_whole(tmp_path / "run", checkpoint)


def first_parameter(trainer: PromptTrainer) -> torch.Tensor:
    return next(p for p in trainer.run.model.parameters() if p.requires_grad).data


def test_no_memory_left(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    config = same_config(whole, run)

    def no_memory(trainer: PromptTrainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        fail_at(11, patch, no_memory)
        with pytest.raises(MemoryError) as error:
            train(config)
    message, checkpoint = str(error.value), run / "checkpoints" / "checkpoint-8"
    remedy = "set training.gradient_checkpointing=true or lower training.eval_batch_size ("
    assert message.startswith(f"out of memory: {remedy}")
    start = "start anew with a smaller training.batch_size (16) and more training.gradient_accumulation_steps (1)"
    assert start in message
    assert message.endswith(goes_on(checkpoint))
    only_whole(run, checkpoint)

    config.training.gradient_checkpointing, config.training.eval_batch_size = True, 4  # the first remedy
    train(config, resume=True)
    assert [e["step"] for e in events(run)] == [e["step"] for e in events(whole.folder)]
    assert losses(run) == pytest.approx(losses(whole.folder), rel=1e-4)


def same_config(whole: Whole, run: Path) -> RunConfig:
    return load_run_config(Path(whole.command[2]), [f"output_dir={run}"])


def fail_at(step: int, patch: pytest.MonkeyPatch, what: Any) -> None:
    """Calls `what` with the trainer once it has computed the gradients of this step."""
    take = PromptTrainer.training_step

    def failing(self: PromptTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = take(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            what(self)
        return loss

    patch.setattr(PromptTrainer, "training_step", failing)


def test_a_damaged_checkpoint_is_not_resumed_from(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    """A power cut has truncated one of its files: the previous one is used, and the result is the same."""
    run = tmp_path / "run"
    newest = whole.started(forks, run, step=15)
    state = newest / "optimizer.pt"
    os.truncate(state, state.stat().st_size // 2)
    before = RunFolder(run).last_checkpoint()
    assert before is not None
    assert before != newest
    whole.finish(forks, run)


def real_memory_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    return error.value


RUN = Path("/somewhere/run")
SAVING = RUN / "checkpoints" / "checkpoint-3"
DISK = {
    "full": (OSError(errno.ENOSPC, "No space", str(RUN / "a")), OSError, f"cannot write {RUN}/a: No space"),
    "full, nameless": (OSError(errno.ENOSPC, "No space"), OSError, r"free\): free some space\. There is no checkpoint"),
    "quota": (OSError(errno.EDQUOT, "Quota exceeded"), OSError, "free some space or have the quota raised"),
    "read-only": (OSError(errno.EROFS, "Read-only", str(RUN / "a")), OSError, r"run/a: Read-only: give this user the"),
    "refused": (PermissionError(errno.EACCES, "Denied", str(RUN / "a")), OSError, "Denied: give this user the right"),
    "safetensors": (SafetensorError("I/O error: none left (os error 28)"), OSError, r"none left .*: free some space\."),
    "torch": (RuntimeError("unexpected pos 576 vs 534"), OSError, "unexpected pos 576 vs 534 .*: look for a full disk"),
    "accelerator": (torch.OutOfMemoryError("HIP out of memory"), MemoryError, "out of memory: set training.gradient_"),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), MemoryError, "out of memory: set"),
    "CPU": (real_memory_error(), MemoryError, "out of memory: .*There is no checkpoint yet"),
    "Python": (MemoryError(), MemoryError, "out of memory: .*load_in_4bit=true. There is no checkpoint yet"),
}  # fmt: skip


@pytest.mark.parametrize("error, kind, message", DISK.values(), ids=DISK)
def test_errors_of_libraries_come_with_advice(
    error: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "unfinished_checkpoint", lambda folder: SAVING)
    with pytest.raises(kind) as found, with_advice(RunConfig(), RunFolder(RUN)), writing(RunFolder(RUN)):
        raise error
    assert re.search(message, str(found.value)), found.value
    assert "[Errno" not in str(found.value)
    assert found.value.__cause__ is not None


def test_a_checkpoint_of_a_run_that_is_to_be_replaced_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "last_checkpoint", lambda folder: SAVING)
    folder = RunFolder(RUN)
    folder.holds_other = True
    with pytest.raises(MemoryError, match=r"There is no checkpoint yet$"), with_advice(RunConfig(), folder):
        raise MemoryError


def test_an_error_of_the_device_while_a_checkpoint_is_saved_is_not_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "unfinished_checkpoint", lambda folder: SAVING)
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with (
        pytest.raises(torch.AcceleratorError) as found,
        with_advice(RunConfig(), RunFolder(RUN)),
        writing(RunFolder(RUN)),
    ):
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", [
    ValueError("x"), RuntimeError("shape"), PermissionError(errno.EACCES, "Denied", "/else"), OSError("x"), KeyError(1),
])  # fmt: skip
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, with_advice(RunConfig(), RunFolder(RUN)), writing(RunFolder(RUN)):
        raise error
    assert found.value is error


def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom permissions do not stop."""
    folder = RunFolder(tmp_path / "a" / "b")
    check_writable(folder.path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OSError, match=rf"cannot write {folder.path}: {tmp_path} is not writable: give this user"):
        check_writable(folder.path)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file: choose a folder as --output"):
        check_writable(tmp_path / "file" / "run")
