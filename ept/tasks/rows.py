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
    """The text of `row` under the task's template.

    `row` is either a row as it lies in the data file (the task's preprocessing is applied) or one of a `TaskData` split
    (its `fields` are used as they are). Raises ValueError when a column is missing, holds no text, or all are empty.
    """
    return fill(task.template, text_fields(task, row))


def text_fields(task: Task, row: Mapping[str, Any]) -> dict[str, str]:
    """The strings of the task's text columns, preprocessed; see `render` for `row` and for what is raised."""
    if is_rendered(task, row):
        values: Mapping[str, Any] = row[FIELDS]
    else:
        for column in task.source_columns:
            if column not in row:
                raise ValueError(missing_column(task, column, row))
        values = row if task.preprocess is None else task.preprocess(row)
    fields = {column: _as_text(column, values[column]) for column in task.columns}
    if not any(value.strip() for value in fields.values()):
        columns = ", ".join(f"'{column}'" for column in task.columns)
        raise ValueError(f"empty text (column {columns}): drop the row or give it text")
    return fields


def is_rendered(task: Task, row: Mapping[str, Any]) -> bool:
    """Tells a row of a `TaskData` split, which has `text` and the `fields` it was rendered from, from a file's."""
    kept = row.get(FIELDS)
    return "text" in row and isinstance(kept, Mapping) and set(task.columns) <= set(kept)


def missing_column(task: Task, column: str, row: Mapping[str, Any]) -> str:
    """The message for a column that is not there; it lists the columns that are."""
    found = ", ".join(f"'{name}'" for name in row if name is not None) or "none"
    message = f"no column '{column}'; columns found: {found}"
    if column in task.columns:
        return f"{message}. The template {task.template!r} names it: rename the column or change the template"
    if column == task.label_column:
        return f"{message}. Task {task.name} reads its labels there: rename the column or set label_column"
    return f"{message}. Task {task.name} needs it: rename the column"


def _as_text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"column '{column}' holds a {type(value).__name__}, not text: flatten it to a string first")


def fit_to_length(
    task: Task, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[str, bool]:
    """The text of `row` in at most `max_length` tokens (no special tokens counted), and whether it had to be shortened.

    The longest column loses its end first, down to the next longest, then both, and so on: each keeps as many tokens as
    one common cap allows. The template's own words stay. Fast tokenizers cut at token boundaries, others at word
    boundaries. Raises ValueError when the template leaves no room for text.
    """
    return shorten(task.template, text_fields(task, row), tokenizer, max_length)


def examples(task: Task, rows: Sequence[Row], source: str) -> list[Row]:
    """The rows as `{text, label, fields}`; raises ValueError with the source and the row (counted from 1)."""
    examples: list[Row] = []
    for number, row in enumerate(rows, start=1):
        try:
            if task.label_column not in row:
                raise ValueError(missing_column(task, task.label_column, row))
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
        examples.append(example)
    if not examples:
        raise ValueError(f"{source} is empty: it needs at least 1 row")
    return examples


def text_key(text: str) -> str:
    """What two texts have in common when they count as the same one: all but case and white space."""
    return " ".join(text.casefold().split())


def dataset(examples: Sequence[Row], labels: Sequence[str]) -> Dataset:
    from datasets import Dataset

    rows = [{**row, "target": labels[row["label"]]} for row in examples]
    if rows and GROUP in rows[0]:
        numbers: dict[str, int] = {}
        for row in rows:
            row[GROUP] = numbers.setdefault(row[GROUP], len(numbers))
    return Dataset.from_list(rows)


def strip_markup(row: Mapping[str, Any]) -> dict[str, Any]:
    """MultiRC's columns without the HTML marks of its paragraphs: `<br>` becomes a space, `<b>` and `</b>` go."""
    columns = ("question", "answer", "paragraph")
    return {c: re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", " ", _as_text(c, row[c]))) for c in columns}


def mark_spans(row: Mapping[str, Any]) -> dict[str, str]:
    """WSC's text with the noun marked as `* noun *` and the pronoun as `# pronoun #`, as T5's preprocessing writes it.

    `spanN_index` counts words between white space. Where the span does not stand at its index (a few rows of the set
    without corrections), its nearest occurrence is marked; raises ValueError when there is none.
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
