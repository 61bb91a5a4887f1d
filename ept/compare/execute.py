"""Executing runs: one after another in this process, side by side in several, or on a cluster through Ray."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from .config import CompareConfig


@dataclass(frozen=True)
class Outcome:
    """The result of a run: the content of its `results.json`, or the error that ended it."""

    folder: Path
    results: dict[str, Any] | None
    error: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Reads the outcome of a finished run; one whose score is not finite, which JSON has no number for, failed."""
        results = json.loads(RunFolder(folder).results.read_text(encoding="utf-8"))
        if results["score"] is None or not math.isfinite(results["score"]):
            return cls(folder, None, f"its {results['metric']} on test is not finite")
        return cls(folder, results)

    @classmethod
    def failed(cls, folder: Path, error: BaseException) -> Outcome:
        """Makes the outcome of a run that `error` ended; keeps the error's first line."""
        first = str(error).strip().partition("\n")[0]
        return cls(folder, None, ": ".join(filter(None, (type(error).__name__, first))))

    @property
    def summary(self) -> str:
        if self.results is None:
            return f"failed: {self.error}"
        found = self.results
        validation = "" if found["best_validation"] is None else f" (validation {found['best_validation']:.4f})"
        return f"{found['metric']} {found['score']:.4f}{validation}, {found['train_seconds']:.0f} s"


def run_all(jobs: Sequence[dict[str, Any]], compare: CompareConfig) -> Iterator[Outcome]:
    """Yields the outcome of each run (a `RunConfig` as a dictionary) as it finishes.

    Raises:
        ValueError: Ray is requested but not installed.
    """
    if compare.executor == "ray":
        yield from _through_ray(jobs, compare.cpus_per_run)
    elif compare.jobs > 1 and len(jobs) > 1:
        yield from _side_by_side(jobs, compare.jobs)
    else:
        yield from map(execute, jobs)


def _side_by_side(jobs: Sequence[dict[str, Any]], at_once: int) -> Iterator[Outcome]:
    """Executes `at_once` runs at a time in separate processes, which share this machine's cores and GPUs.

    If a process dies, joblib ends the others too: all unfinished runs count as failed, and can be continued.
    """
    import joblib
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    dealt = itertools.cycle(gpus or [None])
    tasks = [joblib.delayed(_execute_apart)(job, next(dealt), os.getpid()) for job in jobs]
    waiting = [Path(job["output_dir"]) for job in jobs]
    parallel = joblib.Parallel(min(at_once, len(jobs)), "loky", return_as="generator_unordered", batch_size=1)
    try:
        for outcome in parallel(tasks):
            waiting.remove(outcome.folder)
            yield outcome
    except BrokenProcessPool as error:
        for folder in waiting:
            yield Outcome.failed(folder, error)


def _execute_apart(job: dict[str, Any], gpu: str | None, parent: int) -> Outcome:
    """Executes a run in one of joblib's processes, on the GPU assigned to that process's first run."""
    import torch

    _settle(parent)
    if gpu is not None and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return execute(job)


@functools.cache
def _settle(parent: int) -> None:
    """Silences this process, once, and makes it end with its parent, whose death joblib does not report.

    Otherwise the run would go on while the same command starts it a second time. Ctrl-C reaches the parent as well.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _through_ray(jobs: Sequence[dict[str, Any]], cpus_per_run: int) -> Iterator[Outcome]:
    """Executes runs in Ray's processes, each with its own GPU if there are any.

    Ray joins the cluster named in RAY_ADDRESS, or else starts one on this machine; all machines must share the output
    folder.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("compare.executor=ray needs the package ray: pip install ray, or set it to local")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        remote = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus, max_retries=0)(execute)
        waiting = {remote.remote(job): Path(job["output_dir"]) for job in jobs}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            folder = waiting.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:  # the process died: out of memory, or the machine was lost
                yield Outcome.failed(folder, error)
    finally:
        if started:
            ray.shutdown()


def execute(job: dict[str, Any]) -> Outcome:
    """Trains or resumes one run; an error becomes its outcome, with the traceback in the folder's `error.txt`.

    A run that another comparison in the same folder has finished in the meantime is taken as it is.
    """
    import torch

    from ..runs.train import train

    folder = Path(job["output_dir"])
    if RunFolder(folder).results.is_file():
        return Outcome.of(folder)
    error_file = folder / "error.txt"
    error_file.unlink(missing_ok=True)
    try:
        train(RunConfig.from_dict(job), resume=True)
        return Outcome.of(folder)
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk, say, may be the error itself
            folder.mkdir(parents=True, exist_ok=True)
            error_file.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome.failed(folder, error)
    finally:  # frees memory for the next run
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
