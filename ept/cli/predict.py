"""`ept predict`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, SetOption, TrainedRun, open_run, print_json, quiet

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
        predictions = _predict(open_run(run_dir, set_ or []), texts or [], file)
    if json:
        print_json(predictions)
        return
    for prediction in predictions:
        typer.echo(f"{prediction['word'] if prediction['word'] is not None else '(no label)'}\t{prediction['text']!r}")


def _predict(run: TrainedRun, texts: list[str], file: Path | None) -> list[dict[str, Any]]:
    from ept.runs.predict import predict_labels
    from ept.tasks import read_rows
    from ept.tasks.encoding import fit_rows

    rows = read_rows(file) if file is not None else [{"text": text} for text in texts]
    task, rows = _task_and_rows(run.task, rows, str(file or "text"))
    truncate, source = run.config.data.on_too_long == "truncate", str(file or "text")
    fitted = fit_rows(task, rows, run.tokenizer, run.task_type, run.max_length, truncate=truncate, source=source)
    inputs = [row.text for row in fitted]
    found = predict_labels(
        run.model,
        run.tokenizer,
        inputs,
        run.labels,
        run.task_type,
        run.max_length,
        run.config.training.eval_batch_size,
        run.config.training.scoring,
        values=run.task.values,
        progress="predicting",
    )
    return [
        {
            "text": text,
            "prediction": label if label >= 0 else None,
            "word": run.task.label_words[label] if label >= 0 else None,
        }
        for text, label in zip(inputs, found)
    ]


def _task_and_rows(task: Task, rows: list[dict[str, Any]], name: str) -> tuple[Task, list[dict[str, Any]]]:
    """The task to render the rows with (their own, or the bare text where they have only that), and the rows for it.

    Raises:
        ValueError: the first row has neither the task's columns nor `text`.
    """
    from ept.tasks import local_task

    missing = [column for column in task.source_columns if column not in rows[0]]
    if not missing:
        return task, rows
    if "text" not in rows[0]:
        found = ", ".join(map(str, rows[0])) or "none"
        raise ValueError(f"{name}: no column {', '.join(missing)} and no column text (found: {found})")
    if len(task.source_columns) == 1:
        return task, [{missing[0]: row.get("text")} for row in rows]
    return local_task("{text}", list(task.label_words), max_length=task.max_length), rows
