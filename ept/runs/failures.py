"""Failures from outside, reported in one line each: a full disk, a read-only folder, no memory left, a NaN."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..utils.messages import reason
from .config import RunConfig
from .folder import RunFolder

_FULL = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or have the quota raised",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EIO: "look for a full disk, a quota, or a file size limit (ulimit -f)",
}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors reports an errno
# How PyTorch's CPU allocator and libraries for accelerators report that there is no memory left.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


@contextmanager
def with_advice(config: RunConfig, folder: RunFolder) -> Iterator[None]:
    """Adds advice, and the checkpoint that is left, to errors caused by the machine.

    Raises MemoryError if memory ran out, OSError if a file of the run could not be written, and re-raises a
    FloatingPointError with the checkpoint added.
    """
    try:
        yield
    except Exception as error:
        checkpoint = None if folder.holds_other else folder.last_checkpoint()
        left = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
        going_on = "; --resume continues from there" if checkpoint else ""
        if isinstance(error, FloatingPointError):  # it would happen again
            raise FloatingPointError(f"{error}. {left}") from error
        if _is_out_of_memory(error):
            training, data = config.training, config.data
            gentler = "" if training.gradient_checkpointing else "set training.gradient_checkpointing=true or "
            smaller = "" if data.max_length is None else f" ({data.max_length})"
            quantised = "" if config.model.load_in_4bit else ", or set model.load_in_4bit=true"
            raise MemoryError(
                f"out of memory: {gentler}lower training.eval_batch_size ({training.eval_batch_size}), which --resume "
                f"allows; or start anew with a smaller training.batch_size ({training.batch_size}) and more "
                f"training.gradient_accumulation_steps ({training.gradient_accumulation_steps}), a smaller "
                f"data.max_length{smaller}{quantised}. {left}{going_on}"
            ) from error
        if isinstance(error, OSError):
            name = error.filename
            place = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else folder.path
            if error.errno in _FULL:
                free = shutil.disk_usage(_existing(place)).free / 1e6
                advice = f"{error.strerror} ({free:,.1f} MB are free): {_FULL[error.errno]}"
                raise OSError(f"cannot write {place}: {advice}. {left}{going_on}") from error
            if error.errno in _REFUSED and (place == folder.path or folder.path in place.parents):
                raise OSError(f"{_refused(place, str(error.strerror))}. {left}{going_on}") from error
        raise


@contextmanager
def writing(folder: RunFolder, is_rank_zero: bool = True) -> Iterator[None]:
    """Turns errors of PyTorch and safetensors on rank 0 into OSError if a file cannot be written.

    An incomplete checkpoint is deleted: it is useless, and the disk may be full.
    """
    try:
        yield
    except Exception as error:
        unfinished = folder.unfinished_checkpoint() if is_rank_zero else None
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        place = unfinished or folder.path
        if isinstance(error, SafetensorError) and (found := _SYSTEM_ERROR.search(str(error))):
            raise OSError(int(found[1]), reason(error), str(place)) from error
        is_devices = isinstance(error, torch.AcceleratorError) or _is_out_of_memory(error)
        if unfinished and isinstance(error, RuntimeError) and not is_devices:
            # torch.save does not report the system's reason.
            likely = errno.EIO if os.access(_existing(place), os.W_OK) else errno.EACCES
            raise OSError(likely, reason(error), str(place)) from error
        raise


def check_writable(folder: Path) -> None:
    """Raises OSError, before anything is loaded, if the folder can be neither written to nor created."""
    place = _existing(folder)
    if not place.is_dir():
        raise FileExistsError(f"{place} is a file: choose a folder as --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(_refused(folder, f"{place} is not writable"))


def check_finite(model: torch.nn.Module, step: int, config: RunConfig) -> None:
    """Raises FloatingPointError for a NaN or infinite parameter, before a checkpoint of it replaces a good one."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(
                f"the parameter {name} became NaN or infinite by step {step}: {divergence_advice(config)}"
            )


def divergence_advice(config: RunConfig) -> str:
    training = config.training
    return (
        f"lower training.learning_rate ({training.learning_rate}) or training.low_rank_learning_rate "
        f"({training.low_rank_learning_rate}), for a classifier also training.head_learning_rate, or add "
        "training.warmup_steps"
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def _refused(place: Path, why: str) -> str:
    return f"cannot write {place}: {why}: give this user the right to write there, or choose another --output"


def _existing(path: Path) -> Path:
    """Returns `path`, or the nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
