"""The learning-rate schedules that transformers can make from their names alone."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler


class Schedule(NamedTuple):
    """A schedule that a run can use. `options`: its arguments (one that watches the score is told that higher is
    better). `warms_up`: it starts at 0 if there are warm-up steps; others ignore them.
    """

    options: dict[str, Any]
    warms_up: bool


@cache
def schedules() -> dict[str, Schedule]:
    """Finds the schedules that a run can use, by name.

    The others need settings for which there are no keys, or, like `greedy`, have bounds of their own, which do not fit
    rates that differ between groups.
    """
    found = {}
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1, device="cpu", requires_grad=True)], lr=1.0)
        try:
            schedule = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=2)
        except (TypeError, ValueError):
            continue
        if isinstance(schedule, LRScheduler):
            watches = "metrics" in inspect.signature(schedule.step).parameters
            found[kind.value] = Schedule({"mode": "max"} if watches else {}, optimizer.param_groups[0]["lr"] == 0.0)
    return found
