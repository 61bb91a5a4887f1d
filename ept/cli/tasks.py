"""`ept tasks`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from ept.utils.messages import shares

from .common import JSON, answer, quiet

if TYPE_CHECKING:
    from ept.tasks import Task

app = typer.Typer(help="List the known tasks; `ept tasks show NAME` shows one.", invoke_without_command=True)


@app.callback()
def tasks(context: typer.Context, json: bool = JSON) -> None:
    if context.invoked_subcommand is not None:
        return
    from ept.tasks import TASKS
    from ept.utils.tables import table

    listed = {n: {"columns": t.columns, "labels": t.label_words, "metrics": t.metrics} for n, t in TASKS.items()}
    rows = [
        (name, ", ".join(task.columns), _labels(task, digits=False), "\n".join(task.metrics))
        for name, task in TASKS.items()
    ]
    shown = table(("task", "text columns", "labels", "metrics"), rows, left=4, box=None)
    shown.columns[-1].no_wrap = True
    answer(json, listed, shown)


@app.command()
def show(
    name: str = Argument(help="A task's name, such as glue/sst2."),
    data: Path | None = Option(None, "--data", "--data-dir", metavar="DIR", help="Folder of the task's rows."),
    hub: bool = Option(False, "--hub", help="Load the rows from the hub."),
    tokenizer: str | None = Option(
        None,
        "--tokenizer",
        "--model",
        metavar="NAME",
        help="Model whose tokenizer counts the tokens: folder or hub name.",
    ),
    max_length: int | None = Option(None, help="Limit of a text in tokens, in place of the task's own."),
    labels: str = Option("digits", help="digits or words: how the examples' targets are written."),
    json: bool = JSON,
) -> None:
    """Show a task: its template, labels and metrics.

    With its rows: the rows of each split, the label balance and two formatted examples. With a tokenizer as well: the
    share of texts that are too long.
    """
    from ept.tasks import get_task, load_task
    from ept.tasks.metrics import metric_name

    task = get_task(name)
    if labels not in ("digits", "words"):
        raise ValueError(f"--labels {labels}: choose digits or words")
    if data is not None and hub:
        raise ValueError("--data and --hub exclude each other: give one")
    if max_length is not None and max_length < 1:
        raise ValueError(f"--max-length {max_length}: give at least 1 token")
    if tokenizer is not None and data is None and not hub:
        raise ValueError("--tokenizer counts tokens of rows: give --data DIR or --hub as well")
    limit = max_length if max_length is not None else task.max_length
    description: dict[str, Any] = {
        "name": task.name,
        "template": task.template,
        "columns": list(task.columns),
        "label_column": task.label_column,
        "labels": dict(zip(task.label_digits, task.label_words)),
        "metrics": list(task.metrics),
        "max_length": limit,
        "hub": list(task.hub) if task.hub else None,
        "examples": [],
    }
    if data is not None or hub:
        with quiet():
            from ept.runs.config import DataConfig, ModelConfig
            from ept.runs.data import describe, load_run_data
            from ept.runs.loading import load_tokenizer, task_type_of

            where: dict[str, Any] = {"data_dir": str(data) if data is not None else None, "labels": labels}
            if tokenizer is None:
                loaded = load_task(task, **where)
            else:
                model = ModelConfig(name_or_path=tokenizer)
                config = DataConfig(task=task.name, max_length=limit, **where)
                run_data = load_run_data(config, load_tokenizer(model), task_type_of(model))
                loaded, description["truncation_rate"] = run_data.data, run_data.truncation_rate
            description.update(describe(loaded))
    names = [metric_name(metric, task.label_words) for metric in task.metrics]
    lines = {
        "template": repr(task.template),
        "labels": _labels(task),
        "metrics": f"{', '.join(names)} (the first decides the best checkpoint)",
        "max length": f"{limit} tokens",
        "hub": " ".join(filter(None, task.hub or ())),
    }
    if "rows" in description:
        lines["rows"] = ", ".join(f"{split} {count:,}" for split, count in description["rows"].items())
        lines["balance"] = f"{shares(description['label_balance'])} (train)"
    if "truncation_rate" in description:
        lines["too long"] = shares(description["truncation_rate"])
    shown = [(name, text) for name, text in lines.items() if text]
    shown += [("example", f"{example['text']!r} -> {example['target']!r}") for example in description["examples"]]
    answer(json, description, task.name, *(f"  {name + ':':11} {text}" for name, text in shown))


def _labels(task: Task, digits: bool = True) -> str:
    if task.values:
        return f"{task.label_words[0]} .. {task.label_words[-1]} in steps of {task.values[1] - task.values[0]:g}"
    if not digits:
        return ", ".join(task.label_words)
    return ", ".join(f"{digit} = {word}" for digit, word in zip(task.label_digits, task.label_words))
