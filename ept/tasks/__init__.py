"""Tasks to train on: GLUE, SuperGLUE and local files, each with its text template, labels and metrics."""

from __future__ import annotations

from difflib import SequenceMatcher

from .files import read_rows
from .metrics import METRICS, UNPARSABLE, compute_metrics
from .rows import GROUP, fit_to_length, render
from .splits import load_split, load_task
from .table import GLUE, SUPER_GLUE
from .task import Task, TaskData, local_task, nearest_value

TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, *SUPER_GLUE)}


def get_task(name: str) -> Task:
    """The task of that name. Raises ValueError for an unknown one, with the nearest known name."""
    if name not in TASKS:
        nearest = max(TASKS, key=lambda known: _likeness(name, known))
        raise ValueError(
            f"unknown task '{name}': did you mean '{nearest}'? `ept tasks` lists the {len(TASKS)} known tasks"
        )
    return TASKS[name]


def _likeness(name: str, known: str) -> float:
    """0..1; the name alone counts too: 'sst' is nearer to 'glue/sst2' than to 'glue/rte'."""
    short, name = known.split("/")[1], name.lower()
    return max(SequenceMatcher(None, name, other).ratio() for other in (known, short))


__all__ = [
    "GROUP",
    "METRICS",
    "TASKS",
    "UNPARSABLE",
    "Task",
    "TaskData",
    "compute_metrics",
    "fit_to_length",
    "get_task",
    "load_split",
    "load_task",
    "local_task",
    "nearest_value",
    "read_rows",
    "render",
]
