"""The courses of the learning rates that transformers makes of their names alone."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler


@cache
def schedules() -> dict[str, dict[str, Any]]:
    """Finds the schedules that a run can have, and the options that it gives each: one that watches the score is told
    that higher is better.

    Others need settings that no key gives, or, as `greedy`, have bounds of their own that do not fit rates which differ
    from group to group.
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
            found[kind.value] = {"mode": "max"} if watches else {}
    return found
