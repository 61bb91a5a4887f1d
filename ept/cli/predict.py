"""`ept predict`"""

from __future__ import annotations

from pathlib import Path

from typer import Argument, Option

from .common import JSON, SET, answer, quiet


def predict(
    run_dir: Path = Argument(help="Folder of a finished run."),
    texts: list[str] | None = Argument(None, metavar="[TEXT]...", help="Texts to label."),
    file: Path | None = Option(
        None, help="A file (jsonl, json, csv, parquet) with the task's columns, or a column `text`."
    ),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Label texts with a trained run.

    For a task with one text column a TEXT (or a `text` column) goes into its template; for a task with several it
    is the whole input text, written as `ept tasks show` shows it.
    """
    if bool(texts) == (file is not None):
        raise ValueError("give either texts or --file")
    with quiet():
        from ept.runs.predict import open_run
        from ept.tasks import local_task, read_rows

        run = open_run(run_dir, set_ or [])
        source = str(file or "text")
        rows = read_rows(file) if file is not None else [{"text": text} for text in texts or []]
        task = run.task
        missing = [column for column in task.source_columns if column not in rows[0]]
        if missing and "text" not in rows[0]:
            found = ", ".join(map(str, rows[0])) or "none"
            raise ValueError(f"{source}: no column {', '.join(missing)} and no column text (found: {found})")
        if missing and len(task.source_columns) == 1:
            rows = [{missing[0]: row.get("text")} for row in rows]
        elif missing:
            task = local_task("{text}", list(task.label_words), max_length=task.max_length)
        fitted = run.fit(rows, source, task)
        labels = run.predict([row.ids for row in fitted], progress="predicting")
    words = dict(enumerate(run.task.label_words))  # an answer that is no label is -1
    predictions = [
        {"text": row.text, "prediction": label if label in words else None, "word": words.get(label)}
        for row, label in zip(fitted, labels)
    ]
    answer(json, predictions, *(f"{p['word'] or '(no label)'}\t{p['text']!r}" for p in predictions))
