"""Rows of a file labelled by a trained run: all columns are kept, and answers with their probabilities added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks import Task, local_task, render
from ..tasks.rows import BlankText, with_all_columns
from ..tasks.template import template_end
from ..utils.files import strict_json, write_atomically
from ..utils.tables import csv_text
from .failures import check_writable
from .predict import Predictor

PREDICTION = "prediction"
WRITERS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def probability_columns(task: Task) -> list[str]:
    """Names the columns for the probabilities of the task's labels, in their order."""
    return [f"p({label})" for label in task.label_words]


def label_rows(
    run: Predictor, rows: Sequence[dict[str, Any]], source: str, text_columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Labels rows: adds `prediction` to each and, if labels are ranked, `p(label)` for each label.

    The prediction is a label word, a text, or the number from a classifier's regression head.

    If the task's columns are missing, the column `text` is used. For a task with one column it fills the template;
    otherwise it is the whole input text, and truncation keeps the end that it has in common with the template. The
    prediction is None for a row without text and for an answer that is not a label.

    Args:
        text_columns: the rows' names of the task's columns, in the task's order, if they differ.

    Raises:
        ValueError: neither the task's columns nor `text` are there, or the rows already have a column of a new one's
            name.
    """
    task = run.task
    rows = with_all_columns(rows)
    given: list[Mapping[str, Any]] = list(rows)
    if text_columns:
        check_names(task, text_columns)
        if absent := [column for column in text_columns if column not in rows[0]]:
            raise ValueError(f"{source}: no column {absent[0]} (found: {', '.join(map(str, rows[0]))})")
        given = [{name: row.get(column) for name, column in zip(task.source_columns, text_columns)} for row in rows]
    missing = [column for column in task.source_columns if column not in given[0]]
    if missing and "text" not in rows[0]:
        present = ", ".join(map(str, rows[0])) or "none"
        remedy = "rename one, or name it with --text-column"
        raise ValueError(f"{source}: no column {', '.join(missing)} and no column text (found: {present}): {remedy}")
    if missing and len(task.source_columns) == 1:
        given = [{missing[0]: row.get("text")} for row in rows]
    elif missing:
        task = _whole_text()
    labels, columns = run.task.label_words, probability_columns(run.task)
    taken = {PREDICTION, *columns} & rows[0].keys()
    if taken:
        raise ValueError(f"{source} already has a column {sorted(taken)[0]!r}: rename it")
    blank = {number for number, row in enumerate(given) if _is_blank(task, row)}
    numbers = [number for number in range(len(given)) if number not in blank]
    by_end: dict[str, list[int]] = {"": numbers}
    if task is not run.task:
        by_end, given = _without_ends(given, numbers, template_end(run.task.template).strip())
    ids: dict[int, list[int]] = {}
    for end, of_end in by_end.items():
        fitted = run.fit([given[n] for n in of_end], source, _whole_text(end) if end else task, [n + 1 for n in of_end])
        ids.update(zip(of_end, (text.ids for text in fitted)))
    encoded = [ids[number] for number in numbers]
    written = iter(run.write(encoded, progress="predicting") if run.task.is_text else ())
    answers = iter(run.answer(encoded, progress="predicting") if not run.task.is_text else ())
    labelled = []
    for number, row in enumerate(rows):
        found: dict[str, Any] = {PREDICTION: None}
        if number not in blank and run.task.is_text:
            found[PREDICTION] = next(written)
        elif number not in blank:
            label, probabilities, value = next(answers)
            if label >= 0:
                found[PREDICTION] = labels[label] if value is None else float(f"{value:.7g}")  # single precision
            found |= zip(columns, probabilities or ())
        labelled.append({**row, **found})
    return labelled


def _whole_text(end: str = "") -> Task:
    """Makes a task whose template is a whole text followed by a literal `end`; its labels are unused."""
    return local_task("{text}" + end.replace("{", "{{").replace("}", "}}"), ["0", "1"])


def _without_ends(
    rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], end: str
) -> tuple[dict[str, list[int]], list[Mapping[str, Any]]]:
    """Removes `end`, with the white space around it, from whole texts that have it; also returns the rows by end."""
    by_end, bare = defaultdict(list), list(rows)
    for number in numbers:
        text, found = rows[number].get("text"), ""
        if end and isinstance(text, str) and text.rstrip().endswith(end):
            start = text.rstrip().removesuffix(end).rstrip()
            found = text[len(start) :] if start else ""
            bare[number] = {"text": start or text}
        by_end[found].append(number)
    return by_end, bare


def check_names(task: Task, text_columns: Sequence[str]) -> None:
    """Raises ValueError unless there is one name for each text column of the task."""
    if len(text_columns) != len(task.source_columns):
        wanted = ", ".join(task.source_columns)
        raise ValueError(
            f"--text-column is given {len(text_columns)} times, but the run has the text columns {wanted}: give it "
            "once for each"
        )


def _is_blank(task: Any, row: Mapping[str, Any]) -> bool:
    try:
        render(task, row)
    except BlankText:
        return True
    except ValueError:  # reported with its place when the rows are fitted
        return False
    return False


def write_rows(rows: Sequence[Mapping[str, Any]], file: Path, probabilities: Collection[str]) -> None:
    """Writes rows into a file of one of the kinds in `WRITERS`, which appears complete or not at all.

    In a csv file None is an empty field, and the columns `probabilities` have six digits.
    """
    kind = file.suffix.lower()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if kind == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet

        def array(values: list[Any]) -> Any:
            try:
                return pyarrow.array(values)
            except pyarrow.ArrowException:  # a column of JSON may mix numbers and words
                return pyarrow.array([None if value is None else str(value) for value in values])

        table = pyarrow.table({column: array([row.get(column) for row in rows]) for column in columns})
        write_atomically(file, lambda path: parquet.write_table(table, path))
    elif kind in (".csv", ".tsv"):
        shown = [{n: f"{v:.6f}" if n in probabilities else _in_a_field(v) for n, v in row.items()} for row in rows]
        write_atomically(file, csv_text(columns, shown, "\t" if kind == ".tsv" else ","))
    else:
        lines = [strict_json(row) for row in rows]
        whole = "\n".join(lines) if kind == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
        write_atomically(file, whole + "\n")


def _in_a_field(value: Any) -> Any:
    """Returns a cell as text; a list or an object becomes JSON, which can be read back."""
    return strict_json(value) if isinstance(value, (list, dict)) else value


def check_output(file: Path) -> None:
    """Refuses an output file that cannot be written, before any work is done."""
    if file.suffix.lower() not in WRITERS:
        raise ValueError(f"{file}: unsupported suffix {file.suffix!r}: use one of {', '.join(WRITERS)}")
    if not (folder := file.absolute().parent).is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {folder}: make it first")
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder: give another file")
    check_writable(folder)
