"""`ept evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Argument, Option

from .common import JSON, SET, STRICT, answer, encoding_of, overrides, quiet


def evaluate(
    run_dir: Path = Argument(help="Folder of a finished run."),
    split: str = Option("test", help="train, validation or test."),
    data_dir: Path | None = Option(None, help="Folder of data in place of the run's own."),
    file: Path | None = Option(None, help="One labelled file (csv, tsv, jsonl, json, parquet) in place of a split."),
    text_column: list[str] | None = Option(
        None, "--text-column", metavar="NAME", help="With --file: the name of its text column. Repeatable."
    ),
    label_column: str | None = Option(None, metavar="NAME", help="With --file: the name of its label column."),
    strict: bool = STRICT,
    scoring: str | None = Option(None, help="generate or rank, in place of the task type's default."),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Score a trained run on its test split, or on other data."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"--split {split}: choose one of train, validation, test")
    if file is not None and data_dir is not None:
        raise ValueError("--file and --data-dir exclude each other: give one")
    if (text_column or label_column) and file is None:
        raise ValueError("--text-column and --label-column name columns of --file: give --file too")
    with quiet():
        from ept.runs.config import OF_ROWS
        from ept.runs.data import load_run_data, with_texts
        from ept.runs.folder import SPLITS_FILE
        from ept.runs.labelling import check_names
        from ept.runs.predict import open_run
        from ept.tasks import load_split
        from ept.tasks.metrics import metric_name
        from ept.utils.tables import table

        given: dict[str, object] = {"training.scoring": scoring, "data.strict": strict, "data.data_dir": data_dir}
        of_own_rows = [f"data.{key}=null" for key in OF_ROWS] if data_dir is not None else []
        run = open_run(run_dir, [*of_own_rows, *overrides(set_, given)])
        data = run.config.data
        if file is not None:
            columns = dict(zip([run.task.label_column, *run.task.source_columns], [label_column, *(text_column or [])]))
            names = {name: column for name, column in columns.items() if column is not None}
            if text_column:
                check_names(run.task, text_column)
            form: Any = data.label_form
            reading: Any = {"encoding": encoding_of(set_), "strict": data.strict, "names": names}
            rows = load_split(run.task, file, labels=form, **reading)
            rows, truncation_rate = with_texts(rows, run.fit(list(rows), str(file)))
        else:
            if (
                data_dir is None
                and not any(key.startswith("data.") for key in set_ or [])
                and (run_dir / SPLITS_FILE).is_file()
            ):
                data.splits = str(run_dir)  # as split in training, or an error if the data have changed
            data.max_length = run.max_length
            run_data = load_run_data(data, run.tokenizer, run.task_type, run.config.seed)
            rows, truncation_rate = getattr(run_data.data, split), run_data.truncation_rate[split]
        metrics = run.score(rows, progress="scoring")
    name = split if file is None else str(file)
    task, labels = run.task.name, run.task.label_words
    shown = [(metric_name(metric, labels), f"{value:.4f}") for metric, value in metrics.items()]
    report = {"task": task, "data": name, "rows": len(rows), "truncation_rate": truncation_rate, "metrics": metrics}
    answer(json, report, table(("metric", "value"), shown, f"{task}, {name}, {len(rows):,} rows"))
