"""Tables for a terminal, for a Markdown page and for csv files."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from rich.table import Table
from rich.text import Text

Rows = Iterable[Sequence[str]]


def table(header: Sequence[str], rows: Rows, title: str | None = None, left: int = 1, **style: Any) -> Table:
    """Builds a table for the terminal: the first `left` columns are aligned to the left, all others to the right.

    The first column is never broken. In a narrow terminal other cells are wrapped, and none is cut off. Cells and title
    are printed literally: rich would read `[red]` as markup and `:heart:` as a picture.
    """
    heading = Text(title, "table.title") if title is not None else None
    built = Table(title=heading, min_width=heading.cell_len if heading is not None else None, **style)  # on one line
    for place, column in enumerate(header):
        justify: Any = "left" if place < left else "right"
        built.add_column(Text(column), justify=justify, overflow="fold", no_wrap=place == 0)
    for row in rows:
        built.add_row(*map(Text, row))
    return built


def properties(pairs: Rows, title: str | None = None, left: int = 2) -> Table:
    """Builds a table of (name, value) without a header."""
    built = table(("", ""), pairs, title, left, show_header=False)
    built.columns[0].style = "bold"
    return built


def markdown(header: Sequence[str], rows: Rows, aligned: bool = False) -> str:
    """Returns a Markdown table; `|` in a cell is escaped.

    Args:
        aligned: pads the cells, so that the source is readable too: the first column is aligned to the left, all
            others to the right, in the source as well as on the page.
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    if not aligned:
        lines.insert(1, ["---"] * len(header))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    for line in lines:
        line[:] = [cell.rjust(w) if place else cell.ljust(w) for place, (cell, w) in enumerate(zip(line, widths))]
    first, *others = (f" {' | '.join(line)} " for line in lines)
    rule = "|".join("-" * (w + 1) + (":" if place else "-") for place, w in enumerate(widths))
    return "\n".join(f"|{line}|" for line in (first, rule, *others))


def csv_text(columns: Collection[str], rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> str:
    """Returns the content of a csv file with a header and line feeds at line ends; extra keys of a row are left out.

    Cells with any kind of line break are quoted: if a line ends with a line feed alone, Python before 3.13 does not
    quote a carriage return.
    """
    lines: list[str] = []
    file: Any = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\r\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines)
