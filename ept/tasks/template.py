"""Text templates: literal text with `{column}` fields, which `str.format_map` fills once they are checked here."""

from __future__ import annotations

from string import Formatter


def template_columns(template: str) -> tuple[str, ...]:
    """Lists the columns named in a template, in order of appearance.

    A template is literal text with plain `{column}` fields; `{{` and `}}` stand for braces. Raises ValueError for
    attribute or index access (`{a.b}`, `{a[0]}`), conversions, format specifications, nameless fields, or no field.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write '{{{{' and '}}}}' for literal braces") from error
    columns: list[str] = []
    for _, column, specification, conversion in parts:
        if column is None:  # literal text at the end
            continue
        if not column or column.isdigit():
            raise ValueError(f"template {template!r} has a field without a column name: write '{{column}}'")
        if specification or conversion or any(sign in column for sign in ".[]{}"):
            field = column + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            raise ValueError(
                f"template {template!r}: field '{{{field}}}' is refused, only plain '{{column}}' fields are allowed "
                "(no attributes, indices, conversions or format specifications)"
            )
        columns.append(column)
    if not columns:
        raise ValueError(f"template {template!r} names no column: write at least one field such as '{{text}}'")
    return tuple(dict.fromkeys(columns))


def template_end(template: str) -> str:
    """Returns the literal text after a template's last field."""
    end = ""
    for literal, column, *_ in Formatter().parse(template):
        end = end + literal if column is None else ""
    return end
