"""Text templates: literal text with `{column}` fields, filled safely and, where needed, in a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_columns(template: str) -> tuple[str, ...]:
    """Lists the columns that a template names, in order of appearance.

    A template is literal text with plain `{column}` fields; `{{` and `}}` stand for braces. Raises ValueError for
    attribute or index access (`{a.b}`, `{a[0]}`), conversions, format specifications, nameless fields, or no field.
    """
    columns = tuple(dict.fromkeys(column for _, column in _parse(template) if column is not None))
    if not columns:
        raise ValueError(f"template {template!r} names no column: write at least one field such as '{{text}}'")
    return columns


@lru_cache(maxsize=256)
def _parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """Splits the template into pieces: literal text, and the column after it or None."""
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


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Puts the columns' texts into the template."""
    return "".join(literal + ("" if column is None else fields[column]) for literal, column in _parse(template))


def shorten(
    template: str, fields: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[str, bool]:
    """Fills the template in at most `max_length` tokens (no special tokens counted); tells whether that took a cut.

    The longest column loses its end first, down to the next longest, then both, and so on: each keeps as many tokens as
    one common cap allows. The template's own words stay. Fast tokenizers cut at token boundaries, others at word
    boundaries. Raises ValueError when the template leaves no room for text.
    """
    text = fill(template, fields)
    if _count(tokenizer, text) <= max_length:
        return text, False
    own = _count(tokenizer, fill(template, dict.fromkeys(fields, "")))
    if own >= max_length:
        raise ValueError(
            f"the template alone has {own} tokens, which leaves no room for text within max_length={max_length}: "
            f"shorten the template {template!r} or raise max_length"
        )
    ends = {column: _token_ends(tokenizer, value) for column, value in fields.items()}
    fits, too_long = 0, min(max_length + 1, max(map(len, ends.values())))
    while too_long - fits > 1:  # tokens may merge or split at the seams, so each candidate is counted as a whole
        cap = (fits + too_long) // 2
        candidate = fill(template, {c: _cut(value, ends[c], cap) for c, value in fields.items()})
        if _count(tokenizer, candidate) <= max_length:
            fits, text = cap, candidate
        else:
            too_long = cap
    if not any(_cut(value, ends[c], fits).strip() for c, value in fields.items()):
        raise ValueError(
            f"no part of the text fits beside the template's {own} tokens within max_length={max_length}: "
            f"shorten the template {template!r} or raise max_length"
        )
    return text, True


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _token_ends(tokenizer: PreTrainedTokenizerBase, value: str) -> list[int]:
    """Finds for each token of `value` where a cut after it falls (slow tokenizers: at the last whole word's end)."""
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
