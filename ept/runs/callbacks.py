"""What a run notes and shows while it trains: the log with the time of the steps, and a progress bar."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .folder import MetricsLog


class Recorder(TrainerCallback):
    """Writes every log event to `metrics.jsonl` and measures the time of the steps.

    On a GPU the clock stops only where the Trainer logs, after a synchronisation, and the steps in between share the
    time; on a CPU each step is timed alone.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.file = log
        self.seconds_before = 0.0
        self.started: float | None = None
        self.ended: float | None = None
        self.step_started: float | None = None
        self.steps_open = 0
        self.step_times: list[float] = []
        self.rates: list[float] = []

    def seconds(self) -> float:
        """Wall time of the training loop with its evaluations, over all sittings of a resumed run."""
        if self.started is None:
            return self.seconds_before
        return self.seconds_before + (self.ended or time.perf_counter()) - self.started

    def step_time_ms(self) -> float | None:
        """Median over the steps of this sitting; None when there was none."""
        return statistics.median(self.step_times) * 1e3 if self.step_times else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step_started is None:
            self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rates = [group["lr"] for group in kwargs["optimizer"].param_groups]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        self.steps_open += 1
        on_gpu = args.device.type == "cuda"
        if self.step_started is None or (on_gpu and not (control.should_log or control.should_evaluate)):
            return
        if on_gpu:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.step_started
        self.step_times += [elapsed / self.steps_open] * self.steps_open
        self.step_started, self.steps_open = None, 0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:  # the Trainer's closing summary
            return
        event = {"step": state.global_step, "seconds": round(self.seconds(), 3), **logs}
        if "loss" in logs:
            event["learning_rate"] = self.rates[0]
            event["low_rank_learning_rate"] = self.rates[-1]
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss became {logs['loss']} by step {state.global_step}: lower training.learning_rate "
                    f"({args.learning_rate}) or training.low_rank_learning_rate, or add training.warmup_steps"
                )
        self.file.append(event)


class ProgressBar(TrainerCallback):
    """A bar with loss, score and remaining time on standard error; without a terminal, one line an evaluation."""

    def __init__(self, metric: str, shown: bool = True) -> None:
        self.metric = metric
        self.console = Console(stderr=True, quiet=not shown)
        self.loss = self.score = ""
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.console.is_terminal or self.console.quiet:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        if f"eval_{self.metric}" in logs:
            self.score = f"{self.metric} {logs[f'eval_{self.metric}']:.3f}"
            if self.bar is None:
                self.console.print(f"step {state.global_step}/{state.max_steps}  {self.loss}  {self.score}")
        if self.bar is not None:
            self.bar.update(self.task, description=f"training  {self.loss}  {self.score}")
