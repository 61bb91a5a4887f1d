"""Callbacks of a run's Trainer: a log with step times, a progress bar, and complete checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.files import sync
from ..utils.progress import LINE_SECONDS, print_line, time_left
from .config import RunConfig
from .failures import check_finite, divergence_advice
from .folder import PREFIX, MetricsLog, RunFolder, delete_surplus, read_seal, seal
from .regression import UNIT

if TYPE_CHECKING:
    from .trainer import PromptTrainer

RATES = {"prompt": "learning_rate", "other": "low_rank_learning_rate", "head": "head_learning_rate"}  # by role


class Recorder(TrainerCallback):
    """Callback that logs a run and the times of its steps in `metrics.jsonl`.

    On a GPU the clock is read only when the Trainer logs or evaluates, after a synchronisation, and the steps in
    between share the time equally; on a CPU each step is timed by itself.
    """

    def __init__(self, config: RunConfig, log: MetricsLog) -> None:
        self.config, self.log = config, log
        self.seconds_before = 0.0
        self.started: float | None = None
        self.ended: float | None = None
        self.step_started: float | None = None
        self.steps_open = 0
        self.step_times: list[float] = []
        self.rates: dict[str, float] = {}  # by the name of their setting in the configuration

    def seconds(self) -> float:
        """Returns the seconds of wall time of training with its evaluations, over all sessions of a resumed run."""
        if self.started is None:
            return self.seconds_before
        return self.seconds_before + (self.ended or time.perf_counter()) - self.started

    def step_time_ms(self) -> float | None:
        """Returns the median step time in this session, in milliseconds; None if it had no step."""
        return statistics.median(self.step_times) * 1e3 if self.step_times else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step_started is None:
            self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        of_roles = {group["role"]: group["lr"] / group.get(UNIT, 1.0) for group in groups}
        self.rates = {name: of_roles[role] for role, name in RATES.items() if role in of_roles}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        self.steps_open += 1
        on_gpu = args.device.type != "cpu"
        if self.step_started is None or (on_gpu and not (control.should_log or control.should_evaluate)):
            return
        if on_gpu:
            torch.accelerator.synchronize(args.device)
        elapsed = time.perf_counter() - self.step_started
        self.step_times += [elapsed / self.steps_open] * self.steps_open
        self.step_started, self.steps_open = None, 0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:  # the Trainer's final summary
            return
        event = {"step": state.global_step, "seconds": round(self.seconds(), 3), **logs}
        if "loss" in logs:
            event |= self.rates
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss became {logs['loss']} by step {state.global_step}: {divergence_advice(self.config)}"
                )
        self.log.append(event)


class ProgressBar(TrainerCallback):
    """Progress bar with loss, score and remaining time on standard error.

    Without a terminal it prints a line per evaluation, and at least one every `LINE_SECONDS`. `note` is what an
    evaluation reports in addition to its score.
    """

    def __init__(self, metric: str, shown: bool = True) -> None:
        self.metric = metric
        self.console = Console(stderr=True, quiet=not shown)
        self.live = shown and self.console.is_terminal
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        described = TextColumn("{task.description}")
        self.bar = Progress(described, *columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=None)
        self.loss = self.score = self.note = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.printed = self.started = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if not self.live and time.monotonic() - self.printed > LINE_SECONDS:
            self._print(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        if (score := logs.get(f"eval_{self.metric}")) is not None:
            self.score = f"{self.metric} {score:.3f}"
            if not self.live:
                self._print(state, self.score, self.note)
            elif self.note:
                self._print(state, self.note)
        self.bar.update(self.task, description=f"training  {self.loss}  {self.score}")

    def _print(self, state: TrainerState, *parts: str) -> None:
        """Prints a line with the step, the last loss, `parts` and the remaining time."""
        self.printed = time.monotonic()
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        remaining = ""
        if done and left:
            remaining = time_left(self.printed - self.started, done, done + left)
        line = "  ".join(filter(None, (f"step {state.global_step}/{state.max_steps}", self.loss, *parts, remaining)))
        print_line(self.console, line)


class WholeCheckpoints(TrainerCallback):
    """Callback that marks checkpoints as complete once they are on disk, with state that the Trainer does not save.

    That is each rank's sum of the losses since the last log; it also finds the best checkpoint if the folder has moved.
    """

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer, self.folder, self.processes = trainer, trainer.folder, trainer.run.processes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        locate_best(state, self.folder)
        kept = read_seal(self.folder.checkpoints / f"{PREFIX}{state.global_step}")
        if "loss_sums" in kept:
            loss = kept["loss_sums"][self.processes.rank]
            self.trainer._tr_loss.fill_(math.nan if loss is None else loss)
            self.trainer._globalstep_last_logged = kept["loss_since"]

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        config = self.trainer.run_config
        check_finite(self.trainer.model, state.global_step, config)
        # Once all ranks have sent their sums, all have written their parts.
        losses = self.processes.gather(float(self.trainer._tr_loss))
        if self.processes.is_rank_zero:
            sync(self.trainer.recorder.log.file)  # before the checkpoint of a later step counts
            checkpoint = self.folder.checkpoints / f"{PREFIX}{state.global_step}"
            seal(checkpoint, loss_sums=losses, loss_since=self.trainer._globalstep_last_logged)
            limit, best = config.training.save_total_limit, state.best_global_step
            delete_surplus(self.folder.checkpoints, checkpoint, limit, best)


def locate_best(state: TrainerState, folder: RunFolder) -> None:
    """Points the state, which names the best checkpoint by its path, to the folder's present place."""
    best = folder.checkpoints / f"{PREFIX}{state.best_global_step}"
    state.best_model_checkpoint = str(best) if state.best_global_step and best.is_dir() else None
