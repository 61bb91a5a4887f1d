"""`ept predict`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, SetOption, answer, quiet

if TYPE_CHECKING:
    from ept.tasks import Task


def predict(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to label.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A file (jsonl, json, csv, parquet) with the task's columns, or a column `text`."),
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Label texts with a trained run.

    For a task with one text column a TEXT (or a `text` column) goes into its template; for a task with several it
    is the whole input text, written as `ept tasks show` shows it.
    """
    if bool(texts) == (file is not None):
        raise ValueError("give either texts or --file")
    with quiet():
        from ept.runs.predict import open_run
        from ept.tasks import read_rows

        run = open_run(run_dir, set_ or [])
        source = str(file or "text")
        rows = read_rows(file) if file is not None else [{"text": text} for text in texts or []]
        task, rows = _task_and_rows(run.task, rows, source)
        fitted = run.fit(rows, source, task)
        found = run.predict([row.ids for row in fitted], progress="predicting")
    predictions = [
        {"text": row.text, "prediction": label, "word": run.task.label_words[label]}
        if label >= 0
        else {"text": row.text, "prediction": None, "word": None}
        for row, label in zip(fitted, found)
    ]
    answer(json, predictions, *(f"{p['word'] or '(no label)'}\t{p['text']!r}" for p in predictions))


def _task_and_rows(task: Task, rows: list[dict[str, Any]], source: str) -> tuple[Task, list[dict[str, Any]]]:
    """Chooses the task to render the rows with: their own, or the bare text where they have only that.

    Raises:
        ValueError: the first row has neither the task's columns nor `text`.
    """
    from ept.tasks import local_task

    missing = [column for column in task.source_columns if column not in rows[0]]
    if not missing:
        return task, rows
    if "text" not in rows[0]:
        found = ", ".join(map(str, rows[0])) or "none"
        raise ValueError(f"{source}: no column {', '.join(missing)} and no column text (found: {found})")
    if len(task.source_columns) == 1:
        return task, [{missing[0]: row.get("text")} for row in rows]
    return local_task("{text}", list(task.label_words), max_length=task.max_length), rows
