"""Tasks to train on: GLUE, SuperGLUE and local files, each with its text template, labels and metrics."""

from .files import read_rows
from .metrics import METRICS, UNPARSABLE, compute_metrics
from .rows import GROUP, fit_to_length, render
from .splits import TaskData, load_split, load_task
from .table import TASKS, get_task
from .task import Task, local_task, nearest_value

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
