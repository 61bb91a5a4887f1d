"""Rows of data files as dictionaries, with one clear message for each way a file can be bad."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

Row = dict[str, Any]
File = str | PathLike[str]


def read_rows(path: File) -> list[Row]:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file as dictionaries; values of a csv file are strings.

    Raises FileNotFoundError when there is no such file, ValueError for an unsupported suffix, for content that does not
    parse (with its line) and for a file without rows.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unsupported suffix '{path.suffix}': use one of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: check the path")
    try:
        rows = READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    if not rows:
        raise ValueError(f"{path}: the file is empty: it needs at least 1 row")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}): correct or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {type(row).__name__}, not an object: write {{column: value}}")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):  # the hub's .json files are often JSON lines
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}): correct the file"
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: {type(row).__name__}, not an object: write {{column: value}}")
    return rows


def _read_csv(path: Path) -> list[Row]:
    # By the csv module, not pandas: the texts "NA", "None" and "007" stay what they are.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[Row] = []
        try:
            header = list(reader.fieldnames or ())
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: the header {','.join(header)} names a column twice: rename one of them")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: not the {len(header)} fields of the header: "
                        "correct the line, quote fields that hold commas"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.reader.line_num}: not CSV ({error}): correct the quoting"
            ) from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}): write or copy it again") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""The supported suffixes, in no order of preference."""
