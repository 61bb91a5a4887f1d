"""From the columns of a row to the text a model reads: safe templates, preprocessing, shortening to a length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .task import Task

GROUP = "group"
"""The column of a loaded data set that says which rows belong together."""
FIELDS = "fields"
"""The column of a loaded data set that keeps the text columns a row's `text` was rendered from."""


def render(task: Task, row: Mapping[str, Any]) -> str:
    """The text of `row` under the task's template.

    `row` is either a row as it lies in the data file (the task's preprocessing is applied) or one of a `TaskData` split
    (its `fields` are used as they are). Raises ValueError when a column is missing, holds no text, or all are empty.
    """
    return _fill(task.template, text_fields(task, row))


def text_fields(task: Task, row: Mapping[str, Any]) -> dict[str, str]:
    """The strings of the task's text columns, preprocessed; see `render` for `row` and for what is raised."""
    kept = row.get(FIELDS)
    if isinstance(kept, Mapping) and set(task.columns) <= set(kept):
        values: Mapping[str, Any] = kept
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


def missing_column(task: Task, column: str, row: Mapping[str, Any]) -> str:
    """The message for a column that is not there; it lists the columns that are."""
    found = ", ".join(f"'{name}'" for name in row if name is not None) or "none"
    message = f"no column '{column}'; columns found: {found}"
    if column in task.columns:
        return f"{message}. The template {task.template!r} names it: rename the column or change the template"
    if column == task.label_column:
        return f"{message}. Task {task.name} reads its labels there: rename the column or set label_column"
    return f"{message}. Task {task.name} needs it: rename the column"


def template_columns(template: str) -> tuple[str, ...]:
    """The columns a template names, in order of appearance.

    A template is literal text with plain `{column}` fields; `{{` and `}}` stand for braces. Raises ValueError for
    attribute or index access (`{a.b}`, `{a[0]}`), conversions, format specifications, nameless fields, or no field.
    """
    columns = tuple(dict.fromkeys(column for _, column in _parse(template) if column is not None))
    if not columns:
        raise ValueError(f"template {template!r} names no column: write at least one field such as '{{text}}'")
    return columns


@lru_cache(maxsize=256)
def _parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, column after it or None) for each piece of the template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write '{{{{' and '}}}}' for literal braces") from error
    for _, column, specification, conversion in parts:
        if column is None:
            continue
        if not column or column.isdigit():
            raise ValueError(f"template {template!r} has a field without a column name: write '{{column}}'")
        if specification or conversion or any(sign in column for sign in ".[]{}"):
            field = column + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            raise ValueError(
                f"template {template!r}: field '{{{field}}}' is refused, only plain '{{column}}' fields are allowed "
                "(no attributes, indices, conversions or format specifications)"
            )
    return tuple((literal, column) for literal, column, _, _ in parts)


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return "".join(literal + ("" if column is None else fields[column]) for literal, column in _parse(template))


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
    fields = text_fields(task, row)
    text = _fill(task.template, fields)
    if _count(tokenizer, text) <= max_length:
        return text, False
    own = _count(tokenizer, _fill(task.template, dict.fromkeys(fields, "")))
    if own >= max_length:
        raise ValueError(
            f"the template alone has {own} tokens, which leaves no room for text within max_length={max_length}: "
            f"shorten the template {task.template!r} or raise max_length"
        )
    ends = {column: _token_ends(tokenizer, value) for column, value in fields.items()}
    fits, too_long = 0, min(max_length + 1, max(map(len, ends.values())))
    while too_long - fits > 1:  # tokens may merge or split at the seams, so each candidate is counted as a whole
        cap = (fits + too_long) // 2
        candidate = _fill(task.template, {c: _cut(value, ends[c], cap) for c, value in fields.items()})
        if _count(tokenizer, candidate) <= max_length:
            fits, text = cap, candidate
        else:
            too_long = cap
    if not any(_cut(value, ends[c], fits).strip() for c, value in fields.items()):
        raise ValueError(
            f"no part of the text fits beside the template's {own} tokens within max_length={max_length}: "
            f"shorten the template {task.template!r} or raise max_length"
        )
    return text, True


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _token_ends(tokenizer: PreTrainedTokenizerBase, value: str) -> list[int]:
    """For each token of `value` where a cut after it falls (slow tokenizers: the end of the last whole word)."""
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(value, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoding["offset_mapping"]]
    ends: list[int] = []
    last_end = 0
    for word in re.finditer(r"\S+", value):
        tokens = max(1, _count(tokenizer, word.group()))
        ends += [last_end] * (tokens - 1) + [word.end()]  # inside a word: fall back to the end of the one before
        last_end = word.end()
    return ends


def _cut(value: str, ends: list[int], tokens: int) -> str:
    if tokens >= len(ends):
        return value
    return value[: ends[tokens - 1]].rstrip() if tokens else ""


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
