"""Rows of data files as dictionaries, with one clear message for each way a file can be bad."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

Row = dict[str, Any]
File = str | PathLike[str]


def read_rows(path: File) -> list[Row]:
    """Reads the rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file; values of a csv file are strings.

    Raises FileNotFoundError when there is no such file, ValueError for an unsupported suffix, for content that does not
    parse (with its line) and for a file without rows.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unsupported suffix '{path.suffix}': use one of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: check the path")
    rows: list[Row] = []
    try:
        for place, row in READERS[path.suffix](path):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, {place}: {type(row).__name__}, not an object: write {{column: value}}")
            rows.append(row)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from error
    if not rows:
        raise ValueError(f"{path}: the file is empty: it needs at least 1 row")
    return rows


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    is_array = path.suffix == ".json" and text.lstrip().startswith("[")  # the hub's .json files are often JSON lines
    for number, piece in enumerate([text] if is_array else text.split("\n"), start=1):
        try:
            parsed = json.loads(piece) if piece.strip() else []
        except json.JSONDecodeError as error:
            place = f"{path}, line {number + error.lineno - 1}"
            message = f"{place}: not JSON ({error.msg} at column {error.colno}): correct the line or remove it"
            raise ValueError(message) from error
        if is_array:
            yield from ((f"row {i}", row) for i, row in enumerate(parsed, start=1))
        elif piece.strip():
            yield f"line {number}", parsed


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    # By the csv module, not pandas: the texts "NA", "None" and "007" stay what they are.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: the header {','.join(header)} names a column twice: rename one of them")
            for fields in filter(None, reader):  # empty lines give no fields
                if len(fields) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: the header has {len(header)} columns, this line has "
                        f"{len(fields)}: correct the line, quote fields that hold commas"
                    )
                yield f"line {reader.line_num}", dict(zip(header, fields))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error}): correct the quoting") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}): write or copy it again") from error
    return iter(("", row) for row in rows)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""The supported suffixes; each reader gives the rows, with their places in the file for messages."""
