"""From a row of a file to the text a model reads: its text columns, preprocessed, in the task's template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .files import Row
from .task import Task
from .template import fill, shorten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

GROUP = "group"
"""The column of a loaded data set that says which rows belong together."""
FIELDS = "fields"
"""The column of a loaded data set that keeps the text columns a row's `text` was rendered from."""


def render(task: Task, row: Mapping[str, Any]) -> str:
    """Renders `row` in the task's template.

    `row` is either a row as it lies in the data file (the task's preprocessing is applied) or one of a `TaskData` split
    (its `fields` are used as they are). Raises ValueError when a column is missing, holds no text, or all are empty.
    """
    return fill(task.template, text_fields(task, row))


def text_fields(task: Task, row: Mapping[str, Any]) -> dict[str, str]:
    """Gives the strings of the task's text columns, preprocessed; takes and raises what `render` does."""
    if is_rendered(task, row):
        return {column: row[FIELDS][column] for column in task.columns}
    _check_columns(task, task.source_columns, row)
    values = row if task.preprocess is None else task.preprocess(row)
    fields = {column: _as_text(column, values[column]) for column in task.columns}
    if not any(value.strip() for value in fields.values()):
        columns = ", ".join(f"'{column}'" for column in task.columns)
        raise ValueError(f"empty text (column {columns}): drop the row or give it text")
    return fields


def is_rendered(task: Task, row: Mapping[str, Any]) -> bool:
    """Tells whether a row is of a `TaskData` split: it has `text` and the `fields` that was rendered from."""
    kept = row.get(FIELDS)
    return "text" in row and isinstance(kept, Mapping) and set(task.columns) <= set(kept)


def _check_columns(task: Task, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Raises ValueError for a column that is not there, with those that are."""
    for column in columns:
        if column not in row:
            remedy = f"Task {task.name} needs it: rename the column"
            if column in task.columns:
                remedy = f"The template {task.template!r} names it: rename the column or change the template"
            elif column == task.label_column:
                remedy = f"Task {task.name} reads its labels there: rename the column or set label_column"
            found = ", ".join(f"'{name}'" for name in row) or "none"
            raise ValueError(f"no column '{column}'; columns found: {found}. {remedy}")


def _as_text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"column '{column}' holds a {type(value).__name__}, not text: flatten it to a string first")


def fit_to_length(
    task: Task, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[str, bool]:
    """Renders `row` in at most `max_length` tokens, no special tokens counted, and tells whether that took a cut.

    See `template.shorten` for where the columns are cut and what is raised.
    """
    return shorten(task.template, text_fields(task, row), tokenizer, max_length)


def examples(task: Task, rows: Sequence[Row], source: str) -> list[Row]:
    """Makes `{text, label, fields}` of each row; raises ValueError with the source and the row (counted from 1)."""
    found: list[Row] = []
    for number, row in enumerate(rows, start=1):
        try:
            _check_columns(task, [task.label_column], row)
            fields = text_fields(task, row)
            label = task.label_class(row[task.label_column])
            if label is None:
                raise ValueError(
                    f"label {row[task.label_column]!r} (column '{task.label_column}') is outside the set: "
                    f"allowed are {task.allowed_labels}"
                )
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        example = {"text": fill(task.template, fields), "label": label, FIELDS: fields}
        if task.group_columns:
            example[GROUP] = text_key("\n".join(fields[column] for column in task.group_columns))
        found.append(example)
    return found


def text_key(text: str) -> str:
    """Gives what two texts share when they count as the same one: all but case and white space."""
    return " ".join(text.casefold().split())


def dataset(examples: Sequence[Row], labels: Sequence[str]) -> Dataset:
    """Makes a data set of examples, with the target string of each and groups as numbers."""
    from datasets import Dataset

    rows = [{**row, "target": labels[row["label"]]} for row in examples]
    if rows and GROUP in rows[0]:
        numbers: dict[str, int] = {}
        for row in rows:
            row[GROUP] = numbers.setdefault(row[GROUP], len(numbers))
    return Dataset.from_list(rows)


def strip_markup(row: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the HTML marks out of MultiRC's columns: `<br>` becomes a space, `<b>` and `</b>` go."""
    columns = ("question", "answer", "paragraph")
    return {c: re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", " ", _as_text(c, row[c]))) for c in columns}


def mark_spans(row: Mapping[str, Any]) -> dict[str, str]:
    """Marks WSC's noun as `* noun *` and its pronoun as `# pronoun #`, as T5's preprocessing does.

    `spanN_index` counts words between white space. Where the span is not at its index (in a few rows of the set without
    corrections), its nearest occurrence is marked; raises ValueError when there is none.
    """
    text = row["text"]
    inserts: list[tuple[int, str]] = []
    for number, mark in ((1, "*"), (2, "#")):
        start, end = _find_span(text, row[f"span{number}_text"], int(row[f"span{number}_index"]))
        inserts += [(start, f"{mark} "), (end, f" {mark}")]
    for position, mark in sorted(inserts, reverse=True):
        text = text[:position] + mark + text[position:]
    return {"text": text}


def _find_span(text: str, span: str, index: int) -> tuple[int, int]:
    pattern = re.compile(r"\s+".join(map(re.escape, span.split())) + r"(?!\w)", re.IGNORECASE)
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    hits = [(abs(i - index), hit.span()) for i, start in enumerate(starts) if (hit := pattern.match(text, start))]
    if not span.strip() or not hits:
        raise ValueError(f"span {span!r} does not occur in the text {text!r}: correct the span or drop the row")
    return min(hits)[1]
