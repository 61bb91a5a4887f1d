"""From a row of a file to the text that a model reads: its text columns, preprocessed, in the task's template."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .files import Row
from .task import Task, nearest_value

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GROUP = "group"
"""Column of a loaded dataset: which rows belong together."""
FIELDS = "fields"
"""Column of a loaded dataset: the text columns from which a row's `text` was rendered."""
ROW = "row"
"""Column of a loaded dataset: a row's number in its file, counted from 1."""
NUMBER = "number"
"""Column of a loaded dataset: the number of a regression, as in the file."""
RAW = "raw"
"""Entry of an example: a key that is equal for identical rows of a file, whatever the template."""

HIDDEN = ("-1", "-1.0")
"""Raw values that mark an unknown label, unless they are labels of the task."""
BLANK, UNLABELLED, UNANSWERED = "blank text", "no label", "no answer"


class BlankText(ValueError):
    """Error for a row whose text columns are all empty."""


def render(task: Task, row: Mapping[str, Any]) -> str:
    """Renders `row` in the task's template.

    `row` is either a raw row of the data file (the task's preprocessing is applied) or one of a `TaskData` split (its
    `fields` are used as they are). Raises ValueError if a column is missing or holds no text, or if all are empty.
    """
    return task.template.format_map(text_fields(task, row))


def text_fields(task: Task, row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the strings of the task's text columns, preprocessed; arguments and errors as for `render`."""
    kept = row.get(FIELDS)
    if "text" in row and isinstance(kept, Mapping) and set(task.columns) <= set(kept):
        return {column: kept[column] for column in task.columns}
    _check_columns(task, task.source_columns, row)
    values = row if task.preprocess is None else task.preprocess(row)
    fields = {column: as_text(column, values[column]) for column in task.columns}
    if not any(value.strip() for value in fields.values()):
        columns = ", ".join(f"'{column}'" for column in task.columns)
        raise BlankText(f"empty text (column {columns}): drop the row or give it text")
    return fields


def _check_columns(task: Task, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Raises ValueError for a missing column, naming the columns that are there."""
    for column in columns:
        if column not in row:
            remedy = f"Task {task.name} needs it: rename the column"
            if column in task.columns:
                remedy = f"The template {task.template!r} names it: rename the column or change the template"
            elif column == task.label_column:
                remedy = f"Task {task.name} reads its labels there: rename the column"
                remedy += " or name it with --label-column (data.label_column)" if task.is_local else ""
            found = ", ".join(f"'{name}'" for name in row) or "none"
            raise ValueError(f"no column '{column}'; columns found: {found}. {remedy}")


def as_text(column: str, value: Any) -> str:
    """Returns a cell's text; raises ValueError for a list or another structure."""
    if is_missing(value):
        return ""
    if isinstance(value, (str, int, float, Decimal, date)):
        return str(value)
    raise ValueError(f"column '{column}' holds a {type(value).__name__}, not text: flatten it to a string first")


def fit_to_length(
    task: Task, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[str, bool]:
    """Renders `row` in at most `max_length` tokens, special tokens not counted; also returns whether text was cut.

    The longest column loses its end first, down to the length of the next longest, then both, and so on: one cap on
    tokens holds for all columns. The template's own words stay. Fast tokenizers cut at token boundaries, others at word
    boundaries. Raises ValueError if the template leaves no room for text, and as `render` does.
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
    ends = {column: [0] for column in fields}  # where a cut after 0, 1, .. tokens falls, by column
    for column, value in fields.items():
        if tokenizer.is_fast:
            encoding = tokenizer(value, add_special_tokens=False, return_offsets_mapping=True)
            ends[column] += [end for _, end in encoding["offset_mapping"]]
        else:  # a cut inside a word falls back to the end of the previous word
            for word in re.finditer(r"\S+", value):
                ends[column] += [ends[column][-1]] * (count(word.group()) - 1) + [word.end()]

    def cut(cap: int) -> dict[str, str]:
        return {c: v if cap >= len(ends[c]) - 1 else v[: ends[c][cap]].rstrip() for c, v in fields.items()}

    fits, too_long = 0, min(max_length + 1, max(map(len, ends.values())) - 1)
    while too_long - fits > 1:  # tokens may merge or split at the seams, so each candidate is counted whole
        cap = (fits + too_long) // 2
        candidate = template.format_map(cut(cap))
        if count(candidate) <= max_length:
            fits, text = cap, candidate
        else:
            too_long = cap
    if not any(value.strip() for value in cut(fits).values()):
        raise ValueError(f"no part of the text fits beside the template's {own} tokens {remedy}")
    return text, True


def is_missing(value: Any) -> bool:
    """Checks whether a cell is empty: null, NaN or blank text."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def examples(
    task: Task, rows: Sequence[Row], source: str, strict: bool = True, clamp: bool = False
) -> tuple[list[Row], dict[str, list[int]]]:
    """Makes `{text, label, fields, row, raw}` from each row, and lists the rows that are left out, by reason.

    In a regression `label` is the class of the nearest value, and `number` the number itself. Free-text answers and
    groups add `target` and `group`.

    Rows without a label or answer are left out, or refused if `strict`. Rows with blank text are refused if `strict`.
    Otherwise they are listed but stay, with an empty `text`, until the splits are drawn, which makes the splits the
    same for every template. Raises ValueError with the source and the row (counted from 1).

    Args:
        clamp: moves numbers beyond the range of a regression to its nearer end, with a warning that counts them.
    """
    beyond: list[float] = []
    rows = with_all_columns(rows) if task.is_local else rows
    found: list[Row] = []
    left_out: dict[str, list[int]] = {BLANK: [], UNLABELLED: [], UNANSWERED: []}
    keys = raw_keys(rows, task.target_columns)
    for number, (row, key) in enumerate(zip(rows, keys), start=1):
        try:
            _check_columns(task, task.source_columns if task.is_chat else task.target_columns, row)
            target = None
            if task.is_text:
                target = _target(task, row)
                if target is None and not strict:
                    left_out[UNANSWERED].append(number)
                    continue
                raw, label = target, 0 if target is not None else None
            else:
                raw = row[task.label_column]
                label = task.label_class(raw)
                if label is None and clamp and task.values:
                    label = nearest_value(raw, task.values, clamp=True)
                    beyond += [float(raw)] if label is not None else []
            if label is None and (is_missing(raw) or is_no_label(task, raw)) and not strict:
                left_out[UNLABELLED].append(number)
                continue
            try:
                fields = text_fields(task, row)
            except BlankText:
                if strict:
                    raise
                left_out[BLANK].append(number)
                fields = dict.fromkeys(task.columns, "")
            if label is None and task.is_text:
                raise ValueError(f"no answer (column {', '.join(map(repr, task.target_columns))}): drop the row")
            if label is None:
                allowed = ", ".join(repr(raw) for raw, _ in task.label_map)
                if task.values:
                    allowed = f"numbers {task.values[0]} .. {task.values[-1]}"
                elif not task.label_map:
                    allowed = f"0 .. {task.num_labels - 1} or {', '.join(map(repr, task.label_words))}"
                name = f"label {raw!r} (column '{task.label_column}')"
                raise ValueError(f"{name} is outside the set: allowed are {allowed}{_unnumbered(task, raw)}")
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        text = task.template.format_map(fields) if any(map(str.strip, fields.values())) else ""
        example = {"text": text, "label": label, FIELDS: fields, ROW: number, RAW: key}
        if task.values:
            example[NUMBER] = float(row[task.label_column])
        if target is not None:
            example["target"] = target
        if task.group_columns:
            example[GROUP] = text_key("\n".join(fields[column] for column in task.group_columns))
        found.append(example)
    if beyond:
        which = f"{len(beyond)} of {len(rows)} rows have numbers beyond {task.values[0]:g} .. {task.values[-1]:g}"
        logger.warning(
            "%s: %s (such as %g): a language model reads them as the nearest end of that range",
            source,
            which,
            max(beyond, key=abs),
        )
    return found, {reason: numbers for reason, numbers in left_out.items() if numbers}


def _unnumbered(task: Task, raw: Any) -> str:
    """Returns the remedy for a number in a column of labels that are words: the number's word is unknown."""
    words = [word for word, _ in task.label_map if isinstance(word, str) and not is_number(word)]
    if not words or len(words) < len(task.label_map) or not is_number(raw):
        return ""
    return "; write the word that the number stands for, or map all numbers in data.label_words={0: ..., 1: ...}"


def is_no_label(task: Task, raw: Any) -> bool:
    """Checks whether a cell marks a missing label: -1 in a classification that has no such label."""
    return not task.is_text and not task.values and str(raw) in HIDDEN and task.label_class(raw) is None


def with_all_columns(rows: Sequence[Row]) -> list[Row]:
    """Gives every row all columns of the file, with None for a key that its JSON line omits."""
    names: Row = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(names) else {**names, **row} for row in rows]


def _target(task: Task, row: Mapping[str, Any]) -> str | None:
    """Renders a row's free-text answer; None if all its columns are blank."""
    values = row if task.preprocess is None else task.preprocess(row)
    fields = {column: as_text(column, values[column]) for column in task.target_columns}
    return task.target_template.format_map(fields) if any(map(str.strip, fields.values())) else None


def raw_keys(rows: Sequence[Row], target_columns: Sequence[str]) -> list[str]:
    """Returns a key for each row, equal for identical rows: the text of all columns except those of the answer.

    A column of distinct whole numbers, such as row numbers, is ignored if there are others.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        for column, value in row.items():
            if column not in target_columns and not is_missing(value):
                values[column].append(value)
    columns = sorted(column for column, found in values.items() if not _numbers_rows(found)) or sorted(values)
    return [text_key("\n".join("" if is_missing(row.get(c)) else str(row[c]) for c in columns)) for row in rows]


def _numbers_rows(values: Sequence[Any]) -> bool:
    """Checks whether the values of a column are distinct whole numbers."""
    if not all(map(is_number, values)):
        return False
    numbers = [float(value) for value in values]
    return len(set(numbers)) == len(numbers) and all(map(float.is_integer, numbers))


def is_number(value: Any) -> bool:
    """Checks whether a cell holds a number, possibly as text."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (int, float, Decimal))


def text_key(text: str) -> str:
    """Returns a key that is equal for texts that differ only in case, white space or the composition of accents."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def dataset(examples: Sequence[Row], labels: Sequence[str]) -> Dataset:
    """Makes a dataset from examples, with a target string for each and groups as numbers."""
    from datasets import Dataset

    rows = [{**row, "target": row["target"] if "target" in row else labels[row["label"]]} for row in examples]
    for row in rows:
        row.pop(RAW, None)
    if rows and GROUP in rows[0]:
        numbers: dict[str, int] = {}
        for row in rows:
            row[GROUP] = numbers.setdefault(row[GROUP], len(numbers))
    return Dataset.from_list(rows)
