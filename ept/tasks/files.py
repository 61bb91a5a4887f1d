"""Rows of data files as dictionaries, with a clear message for each way in which a file can be bad."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from ..utils.messages import listed

logger = logging.getLogger(__name__)

Row = dict[str, Any]
File = str | PathLike[str]

DELIMITERS = ",;\t|"
MAX_ACCENTED = 0.2
"""Text that is not UTF-8 is taken for cp1252 if at most this share of its letters is beyond ASCII: 0 to 15 % in
European languages, over 50 % in Cyrillic, Greek or Japanese text read as cp1252."""
_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}  # at the start of a file
ENCODINGS = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "shift_jis", "gb18030", "big5", "euc_kr")


def read_rows(path: File, encoding: str | None = None, names_labels: bool = False) -> list[Row]:
    """Reads the rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file; values of a csv file are strings.

    A `.json` file may be an array of rows, JSON lines, one row, or an object with the array under any one key. The
    fields of a `.csv` file may be separated by commas, semicolons, tabs or bars. In a tab-separated file whose lines
    are whole rows only without CSV quoting, quotes are plain text, with a warning. Columns with neither a name nor a
    value are dropped.

    Args:
        encoding: of a text file. None: UTF-8, or UTF-16 or UTF-32 by their byte order marks; a csv file that is none of
            these may be read as cp1252, with a warning.
        names_labels: replaces the numbers of class labels by their names, if a Parquet file has them.

    Raises FileNotFoundError if there is no such file, and ValueError for an unsupported suffix or encoding, content
    that does not parse (with its line or row), or a file without rows.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: unsupported suffix '{path.suffix}': use one of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: check the path")
    rows: list[Row] = []
    for place, row in READERS[path.suffix.lower()](path, encoding):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: {type(row).__name__}, not an object: write {{column: value}}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file is empty: it needs at least 1 row")
    if names_labels and path.suffix.lower() == ".parquet":
        from datasets import Features
        from pyarrow import parquet  # type: ignore[import-untyped]

        name_labels(rows, Features.from_arrow_schema(parquet.read_schema(path)))
    return rows


def name_labels(rows: Iterable[Row], features: Mapping[str, Any]) -> None:
    """Replaces the numbers of class labels by their names, and negative ones (a hidden label) by None."""
    from datasets import ClassLabel

    for column, feature in features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                hidden = row[column] is None or row[column] < 0
                row[column] = None if hidden else feature.int2str(row[column])


def read_text(path: Path, encoding: str | None = None, guess: bool = False) -> str:
    """Reads a text file without its byte order mark; arguments and errors as in `read_rows`.

    Args:
        guess: reads text that is not UTF-8 as cp1252, with a warning, if it has as few accents as a European language.
    """
    content = path.read_bytes()
    marked = next((name for name, marks in _MARKS.items() if content.startswith(marks)), "UTF-8")
    name = encoding or marked
    try:
        text = content.decode(name).removeprefix("\ufeff")
    except LookupError as error:
        raise ValueError(f"unknown encoding {encoding!r}: name one that Python knows, such as cp1252") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        letters = [sign for sign in _decoded(content, "cp1252") or "" if sign.isalpha()]
        if guess and not encoding and 0 < sum(not sign.isascii() for sign in letters) <= MAX_ACCENTED * len(letters):
            _warn(f"{path} is not UTF-8 (line {line}) and is read as cp1252: data.encoding names another")
            return content.decode("cp1252")
        fitting = ", ".join(other for other in ENCODINGS if _decoded(content, other) is not None)
        byte = f"byte 0x{content[error.start]:02x} is not {name if encoding else 'UTF-8'}"
        remedy = "save the file as UTF-8, or set data.encoding to its own" + (
            f" (it may be {fitting})" if fitting else ""
        )
        raise ValueError(f"{path}, line {line}: {byte}: {remedy}") from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        wide = next((n for n, i in (("utf-16-le", 1), ("utf-16-be", 0)) if not any(content[i : i + 20 : 2])), None)
        remedy = f"set data.encoding to its own (it may be {wide})" if wide else "take it out, or copy the file again"
        raise ValueError(f"{path}, line {line}: a byte 0x00, which does not belong in text: {remedy}")
    return text


@cache
def _warn(message: str) -> None:
    """Warns once per message: a file may be read again."""
    logger.warning("%s", message)


def _decoded(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


def _read_json(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    text = read_text(path, encoding)
    if (path.suffix.lower() == ".json" and text.strip()) or text.lstrip().startswith("["):
        try:
            yield from _checked(text, lambda whole: _rows_of(whole, path), lambda number: f"{path}, row {number}")
            return
        except json.JSONDecodeError as error:
            if path.suffix.lower() == ".json" and (error.msg != "Extra data" or text.lstrip().startswith("[")):
                raise _not_json(path, error.lineno, error) from error
    for number, line in enumerate(text.split("\n"), start=1):  # .json files on the Hub are often JSON lines
        try:
            if line.strip():
                (row,) = _checked(line, lambda row: [row], lambda _: f"{path}, line {number}")  # noqa: B023
                yield row
        except json.JSONDecodeError as error:
            raise _not_json(path, number, error) from error


def _checked(text: str, rows_of: Callable[[Any], list[Any]], place: Callable[[int], str]) -> list[tuple[str, Any]]:
    """Parses JSON into rows and refuses what JSON allows: a key given twice, half a surrogate pair."""
    twice: dict[int, str] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice[id(values)] = next(name for name in names if names.count(name) > 1)
        return values

    def repeated(value: Any) -> str | None:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return twice.get(id(value)) or next(filter(None, map(repeated, parts)), None)

    whole = json.loads(text, object_pairs_hook=unique)
    rows = rows_of(whole)
    for number, row in enumerate(rows, start=1):
        if twice and (name := repeated(row)) is not None:
            raise ValueError(f"{place(number)}: the key {name!r} is given twice: keep one")
        if "\\u" in text:
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise ValueError(
                    f"{place(number)}: {half} is half of a character: write both halves or none"
                ) from error
    return [(place(number).rpartition(", ")[2], row) for number, row in enumerate(rows, start=1)]


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> ValueError:
    return ValueError(
        f"{path}, line {line}: not JSON ({error.msg} at column {error.colno}): correct the line or remove it"
    )


def _rows_of(whole: Any, path: Path) -> list[Any]:
    """Finds the rows in the parsed content of a `.json` file."""
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        arrays = {key: value for key, value in whole.items() if isinstance(value, list)}
        tables = [value for value in arrays.values() if value and all(isinstance(row, dict) for row in value)]
        if len(tables) == 1:
            return tables[0]
        if not arrays and not any(isinstance(value, dict) for value in whole.values()):
            return [whole]
    found = f"an object with {listed(map(repr, whole))}" if isinstance(whole, dict) else type(whole).__name__
    raise ValueError(f"{path} holds {found}, not rows: write an array of objects, [{{column: value}}, ...]")


def _read_csv(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    # With the csv module, not pandas, so that the texts "NA", "None" and "007" stay as they are.
    csv.field_size_limit(2**31 - 1)
    text = read_text(path, encoding, guess=True)  # JSON is UTF-8 by definition, a csv file may be anything
    told = re.match(r"sep=([,;\t|])\r?\n", text)  # written by some spreadsheets
    text = text[told.end() :] if told else text
    delimiter = told[1] if told else find_delimiter(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    line = text.lstrip("\r\n").partition("\n")[0]
    spaced = delimiter in line and line.count(delimiter) == line.count(f"{delimiter} ")  # a, b, c
    options: Any = {"strict": True, "delimiter": delimiter, "skipinitialspace": spaced}
    above = 1 if told else 0
    if delimiter == "\t" and _has_quotes_as_text(text, options):
        _warn(f"{path}: quotes are read as plain text, because CSV quoting would join or break lines")
        options["quoting"] = csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    lines = filter(None, reader)  # skips empty lines
    try:
        header = [name.strip() for name in next(lines, [])]
        empty = {index for index, name in enumerate(header) if not name}  # spreadsheets leave such columns at the end
        rows = []
        for fields in lines:
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {above + reader.line_num}: the header has {len(header)} columns, but this line "
                    f"has {len(fields)}: correct the line, quote fields that hold {_name(delimiter)}"
                )
            empty = {index for index in empty if not fields[index].strip()}
            rows.append((f"line {above + reader.line_num}", fields))
    except csv.Error as error:
        raise ValueError(f"{path}, line {above + reader.line_num}: not CSV ({error}): correct the quoting") from error
    kept = [index for index in range(len(header)) if index not in empty]
    if nameless := next((index for index in kept[1:] if not header[index]), None):  # the first may number the rows
        place = next(place for place, fields in rows if fields[nameless].strip())
        raise ValueError(f"{path}, {place}: column {nameless + 1} has no name in the header: give it one, or clear it")
    if len({header[index] for index in kept}) < len(kept):
        raise ValueError(f"{path}: the header {','.join(header)} names a column twice: rename one of them")
    for place, fields in rows:
        yield place, {header[index]: fields[index] for index in kept}


def _has_quotes_as_text(text: str, options: Mapping[str, Any]) -> bool:
    """Checks whether quotes in a tab-separated file are ordinary characters, as in GLUE's files.

    They are if without quoting every line has as many fields as the header, and with quoting the rows or their numbers
    of fields differ. A header with quotes comes from a writer that quotes; a single column tells nothing.
    """

    def sizes(**quoting: Any) -> list[int]:
        return [len(row) for row in csv.reader(io.StringIO(text, newline=""), **options, **quoting) if row]

    plain = sizes(quoting=csv.QUOTE_NONE) if '"' in text else []
    if len(set(plain)) != 1 or plain[0] == 1 or '"' in text.lstrip("\r\n").partition("\n")[0]:
        return False
    try:
        return sizes() != plain
    except csv.Error:
        return True


def _name(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}[delimiter]


def find_delimiter(text: str, usual: str = ",") -> str:
    """Finds the delimiter of a csv file: `usual` if its header has none.

    The csv module's sniffer sees only the header, because texts contain commas and semicolons too. If the rows then do
    not have as many fields as the header, another delimiter in the header is taken with which they do.
    """
    header = text.lstrip("\r\n").partition("\n")[0]
    try:
        found = csv.Sniffer().sniff(header, delimiters=DELIMITERS).delimiter
    except csv.Error:
        found = usual
    if usual == "\t" and usual in header:
        found = usual

    def fits(delimiter: str) -> bool:
        try:
            rows = list(itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 50))
        except csv.Error:
            return False
        return len({len(row) for row in rows if row}) == 1

    candidates = [sign for sign in dict.fromkeys((found, *DELIMITERS)) if sign in header]
    return next(filter(fits, candidates), found)


def _read_parquet(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _values(batch):
                    yield f"row {number + 1}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "not a whole Parquet file" if number == 0 else f"row {number + 1} cannot be read"
        raise ValueError(f"{path}: {what} ({error}): write or copy it again") from error


def _values(batch: Any) -> Iterable[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # then row by row, up to the damaged one
        return (batch.slice(index, 1).to_pylist()[0] for index in range(len(batch)))


READERS: dict[str, Callable[[Path, str | None], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers by supported suffix; each yields the rows, with their places in the file for messages."""
OTHER_FILES = {".xlsx", ".xls", ".ods", ".txt", ".gz", ".zip", ".arrow"}
"""Suffixes that mark a name as that of a file, although such files are not read."""
