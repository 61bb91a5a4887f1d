"""`ept tasks`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, print_json, print_table, quiet

app = typer.Typer(help="List the known tasks; `ept tasks show NAME` shows one.", invoke_without_command=True)


@app.callback()
def tasks(context: typer.Context, json: JsonOption = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from ept.tasks import TASKS

    if json:
        listed = {n: {"columns": t.columns, "labels": t.label_words, "metrics": t.metrics} for n, t in TASKS.items()}
        print_json(listed)
        return
    table = Table("task", "text columns", "labels", "metrics")
    for name, task in TASKS.items():
        table.add_row(name, ", ".join(task.columns), ", ".join(task.label_words), ", ".join(task.metrics))
    print_table(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A task's name, such as glue/sst2.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the task's data, to show two examples from.")] = None,
    labels: Annotated[str, typer.Option(help="digits or words: how the examples' targets are written.")] = "digits",
    json: JsonOption = False,
) -> None:
    """Show a task's template, labels and metric and, with data, two formatted examples."""
    from ept.tasks import get_task, load_task

    task = get_task(name)
    examples: list[dict[str, str]] = []
    if data_dir is not None:
        if labels not in ("digits", "words"):
            raise ValueError(f"--labels {labels}: choose digits or words")
        with quiet():
            train = load_task(task, data_dir=data_dir, labels=labels).train  # type: ignore[arg-type]
        examples = [{"text": row["text"], "target": row["target"]} for row in train.select(range(min(2, len(train))))]
    description = {
        "name": task.name,
        "template": task.template,
        "columns": list(task.columns),
        "label_column": task.label_column,
        "labels": dict(zip(task.label_digits, task.label_words)),
        "metrics": list(task.metrics),
        "max_length": task.max_length,
        "hub": list(task.hub) if task.hub else None,
        "examples": examples,
    }
    if json:
        print_json(description)
        return
    typer.echo(f"{task.name}")
    typer.echo(f"  template:   {task.template!r}")
    typer.echo(f"  labels:     {', '.join(f'{d} = {w}' for d, w in zip(task.label_digits, task.label_words))}")
    typer.echo(f"  metrics:    {', '.join(task.metrics)} (the first decides the best checkpoint)")
    typer.echo(f"  max length: {task.max_length} tokens")
    if task.hub:
        typer.echo(f"  hub:        {' '.join(task.hub)}")
    for example in examples:
        typer.echo(f"  example:    {example['text']!r} -> {example['target']!r}")
