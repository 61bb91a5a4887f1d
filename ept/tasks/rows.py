"""From a row of a file to the text a model reads: its text columns, preprocessed, in the task's template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .files import Row
from .task import Task

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
    return task.template.format_map(text_fields(task, row))


def text_fields(task: Task, row: Mapping[str, Any]) -> dict[str, str]:
    """Gives the strings of the task's text columns, preprocessed; takes and raises what `render` does."""
    kept = row.get(FIELDS)
    if "text" in row and isinstance(kept, Mapping) and set(task.columns) <= set(kept):
        return {column: kept[column] for column in task.columns}
    _check_columns(task, task.source_columns, row)
    values = row if task.preprocess is None else task.preprocess(row)
    fields = {column: as_text(column, values[column]) for column in task.columns}
    if not any(value.strip() for value in fields.values()):
        columns = ", ".join(f"'{column}'" for column in task.columns)
        raise ValueError(f"empty text (column {columns}): drop the row or give it text")
    return fields


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


def as_text(column: str, value: Any) -> str:
    """Gives a cell's text; raises ValueError for a list or another structure."""
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"column '{column}' holds a {type(value).__name__}, not text: flatten it to a string first")


def fit_to_length(
    task: Task, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[str, bool]:
    """Renders `row` in at most `max_length` tokens, no special tokens counted, and tells whether that took a cut.

    The longest column loses its end first, down to the next longest, then both, and so on: each keeps as many tokens as
    one common cap allows. The template's own words stay. Fast tokenizers cut at token boundaries, others at word
    boundaries. Raises ValueError when the template leaves no room for text, and as `render`.
    """
    template, fields = task.template, text_fields(task, row)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    text = template.format_map(fields)
    if count(text) <= max_length:
        return text, False
    own = count(template.format_map(dict.fromkeys(fields, "")))
    remedy = f"within max_length={max_length}: shorten the template {template!r} or raise max_length"
    if own >= max_length:
        raise ValueError(f"the template alone has {own} tokens, which leaves no room for text {remedy}")
    ends = {column: [0] for column in fields}  # of each column, where a cut after 0, 1, .. tokens falls
    for column, value in fields.items():
        if tokenizer.is_fast:
            encoding = tokenizer(value, add_special_tokens=False, return_offsets_mapping=True)
            ends[column] += [end for _, end in encoding["offset_mapping"]]
        else:  # inside a word: fall back to the end of the one before
            for word in re.finditer(r"\S+", value):
                ends[column] += [ends[column][-1]] * (count(word.group()) - 1) + [word.end()]

    def cut(cap: int) -> dict[str, str]:
        return {c: v if cap >= len(ends[c]) - 1 else v[: ends[c][cap]].rstrip() for c, v in fields.items()}

    fits, too_long = 0, min(max_length + 1, max(map(len, ends.values())) - 1)
    while too_long - fits > 1:  # tokens may merge or split at the seams, so each candidate is counted as a whole
        cap = (fits + too_long) // 2
        candidate = template.format_map(cut(cap))
        if count(candidate) <= max_length:
            fits, text = cap, candidate
        else:
            too_long = cap
    if not any(value.strip() for value in cut(fits).values()):
        raise ValueError(f"no part of the text fits beside the template's {own} tokens {remedy}")
    return text, True


def examples(task: Task, rows: Sequence[Row], source: str) -> list[Row]:
    """Makes `{text, label, fields}` of each row; raises ValueError with the source and the row (counted from 1)."""
    found: list[Row] = []
    for number, row in enumerate(rows, start=1):
        try:
            _check_columns(task, [task.label_column], row)
            fields = text_fields(task, row)
            label = task.label_class(row[task.label_column])
            if label is None:
                allowed = ", ".join(repr(raw) for raw, _ in task.label_map)
                if task.values:
                    allowed = f"numbers {task.values[0]} .. {task.values[-1]}"
                elif not task.label_map:
                    allowed = f"0 .. {task.num_labels - 1} or {', '.join(map(repr, task.label_words))}"
                name = f"label {row[task.label_column]!r} (column '{task.label_column}')"
                raise ValueError(f"{name} is outside the set: allowed are {allowed}")
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        example = {"text": task.template.format_map(fields), "label": label, FIELDS: fields}
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
