"""Files in everyday forms: delimiters, encodings, JSON of several shapes, and what is refused in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ept.tasks import read_rows

TWO = [{"text": "so, so; fine", "label": "good"}, {"text": "a|b\tc", "label": "bad"}]
QUOTED = [{"text": 'two\nlines, "so"', "label": "good"}]

# name, content, rows
READ = [
    ("a.csv", 'text,label\n"so, so; fine",good\na|b\tc,bad\n', TWO),
    ("a.csv", 'text;label\n"so, so; fine";good\na|b\tc;bad\n', TWO),
    ("a.csv", 'text\tlabel\nso, so; fine\tgood\n"a|b\tc"\tbad\n', TWO),
    ("a.tsv", 'text\tlabel\r\nso, so; fine\tgood\r\n"a|b\tc"\tbad\r\n', TWO),
    ("a.CSV", 'text|label\nso, so; fine|good\n"a|b\tc"|bad\n', TWO),
    ("a.csv", '"text, in full";label\nfine;good\n', [{"text, in full": "fine", "label": "good"}]),
    ("a.csv", "text;comment, if any;label\na,b,c;d;e\n", [{"text": "a,b,c", "comment, if any": "d", "label": "e"}]),
    ("a.csv", "text\nso, so\n", None),  # a line of two fields below a header of one
    ("a.csv", 'text,label\n"two\nlines, ""so""",good\n', QUOTED),
    ("a.csv", "\ufefftext,label\n日本語 🎉,good\n", [{"text": "日本語 🎉", "label": "good"}]),
    ("a.csv", "text,label\nÇa coûte 5 €,good\n".encode("cp1252"), [{"text": "Ça coûte 5 €", "label": "good"}]),
    ("a.csv", "text\tlabel\nüber\tgood\n".encode("utf-16"), [{"text": "über", "label": "good"}]),
    ("a.csv", "text\tlabel\nüber\tgood\n".encode("utf-32"), [{"text": "über", "label": "good"}]),
    ("a.csv", 'text, label\n"so, so", good\n', [{"text": "so, so", "label": "good"}]),
    ("a.csv", 'sep=;\r\ntext;label\r\n"so, so";good\r\n', [{"text": "so, so", "label": "good"}]),
    ("a.csv", "\n\ntext,label\n\nso,good\n", [{"text": "so", "label": "good"}]),
    ("a.csv", "text;label;;\r\nso;good;;\r\n", [{"text": "so", "label": "good"}]),
    ("a.csv", "text,,label,\nso,,good, \n", [{"text": "so", "label": "good"}]),
    ("a.csv", ",text,,\n0,so,,\n", [{"": "0", "text": "so"}]),  # the first is a number of rows
    ("a.csv", "text ,label\n so, good\n", [{"text": " so", "label": " good"}]),
    ("a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": "x\u2028y\x85z"}', [{"a": 1}, {"a": "x\u2028y\x85z"}]),
    ("a.jsonl", '{"a": "\\ud83c\\udf89"}', [{"a": "🎉"}]),
    ("a.jsonl", '[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    ("a.json", '{\n  "a": 1,\n  "b": "x"\n}', [{"a": 1, "b": "x"}]),
    ("a.json", '{"version": "1", "data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
    ("a.json", '{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
]


@pytest.mark.parametrize("name, content, rows", READ)
def test_read(tmp_path: Path, name: str, content: str | bytes, rows: list[dict[str, str]] | None) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if rows is None:
        with pytest.raises(ValueError, match="the header has 1 columns, but this line has 2"):
            read_rows(file)
    else:
        assert read_rows(file) == rows


def test_a_guessed_encoding_is_told_and_another_can_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text,label\nfine,a\nÇa coûte 5 €,b\n".encode("cp1252"))
    read_rows(file)
    assert "a.csv is not UTF-8 (line 3) and is read as cp1252: data.encoding names another" in caplog.text
    file.write_bytes("text,label\nПривет,a\n".encode("cp1251"))
    with pytest.raises(
        ValueError, match=r"line 2: byte 0xcf is not UTF-8: save .* set data.encoding .*it may be .*cp1251"
    ):
        read_rows(file)
    assert read_rows(file, "cp1251") == [{"text": "Привет", "label": "a"}]
    with pytest.raises(ValueError, match="unknown encoding 'cp9': name one that Python knows, such as cp1252"):
        read_rows(file, "cp9")
    with pytest.raises(ValueError, match="byte 0xcf is not ascii"):
        read_rows(file, "ascii")


# lines of a file with tabs, rows; its quotes are text
LITERAL = [
    (['"Never.', "so, so", 'Miss it."'], ['"Never.', "so, so", 'Miss it."']),  # opened, and closed two lines below
    (['"Never.', "so, so"], ['"Never.', "so, so"]),  # never closed
    (['"Never" is long', '5" wide'], ['"Never" is long', '5" wide']),
    (['"a ""b"" c"', '"Never" is long'], ['"a ""b"" c"', '"Never" is long']),
]
# as above; CSV's quoting
QUOTING = [
    (['"a ""b"" c"', 'so "so"'], ['a "b" c', 'so "so"']),
    (['"a\tb"', '"c\r\nd"'], ["a\tb", "c\r\nd"]),
]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize(
    "texts, rows, literal", [*((*pair, True) for pair in LITERAL), *((*p, False) for p in QUOTING)]
)
def test_quotes_in_a_file_with_tabs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, texts: list[str], rows: list[str], literal: bool
) -> None:
    file = tmp_path / name
    file.write_bytes("\r\n".join(["text\tlabel", *(f"{text}\tgood" for text in texts)]).encode())
    assert read_rows(file) == [{"text": text, "label": "good"} for text in rows]
    assert ("quotes are read as plain text" in caplog.text) == literal


def test_quotes_between_two_columns_and_in_a_header(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('a\tb\tlabel\n"one\ttwo"\t1\n', encoding="utf-8")
    assert read_rows(file) == [{"a": '"one', "b": 'two"', "label": "1"}]
    file.write_text('"a"\t"label"\n"so \\"so\\""\t1\n', encoding="utf-8")  # as R writes it
    with pytest.raises(ValueError, match="line 2: not CSV"):
        read_rows(file)
    file.write_text('text\n"two\nlines"\n', encoding="utf-8")
    assert read_rows(file) == [{"text": "two\nlines"}]


# name, content, message
REFUSED = [
    ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "a.jsonl, line 2: the key 'a' is given twice: keep one"),
    ("a.jsonl", '{"a": [{"b": 1, "b": 2}]}\n', "line 1: the key 'b' is given twice"),
    ("a.json", '[{"a": 1}, {"a": 1, "a": 3}]', "a.json, row 2: the key 'a' is given twice"),
    ("a.jsonl", '{"a": 1}\n{"a": "x\\ud83c"}\n', r"a.jsonl, line 2: \\ud83c is half of a character"),
    ("a.json", '[{"a": 1}, {"a": "\\udf89"}]', r"a.json, row 2: \\udf89 is half of a character"),
    (
        "a.jsonl",
        b'{"a": "\xe9"}',
        "line 1: byte 0xe9 is not UTF-8: save .* set data.encoding to its own .it may be cp1252",
    ),
    ("a.json", '{"text": ["a"], "label": [1]}', "holds an object with 'text', 'label', not rows: write an array"),
    ("a.json", '{"data": [1, 2]}', "holds an object with 'data', not rows"),
    ("a.json", '{"text": {"0": "a"}, "label": {"0": 1}}', "holds an object with 'text', 'label', not rows"),
    ("a.json", "7", "holds int, not rows"),
    ("a.jsonl", '["a", 1]\n["b", 0]\n', "line 1: list, not an object"),
    ("a.json", '{\n "a": 1,\n}', f"a.json, line {2 if sys.version_info >= (3, 13) else 3}: not JSON"),
    ("a.json", json.dumps({str(i): {} for i in range(99)}), "an object with '0', .* '7', and 91 more, not rows"),
    ("a.csv", "text,label\nso,a\nso,b\0\n", "line 3: a byte 0x00, which does not belong in text: take it out"),
    ("a.csv", "text,label\nso,a\n".encode("utf-16-le"), r"set data.encoding to its own \(it may be utf-16-le\)"),
    ("a.csv", "text,label\nso,a\n".encode("utf-16-be"), r"set data.encoding to its own \(it may be utf-16-be\)"),
    ("a.csv", "sep=,\na,b\nx,y,z\n", "line 3: the header has 2 columns, but this line has 3"),
    ("a.csv", ",a,\n0,x,y\n", "a.csv, line 2: column 3 has no name in the header: give it one, or clear it"),
    ("a.csv", "a,,\nx,y,z\n", "a.csv, line 2: column 2 has no name in the header: give it one, or clear it"),
    (
        "a.tsv",
        "a\tb\nx\ty\tz\n",
        "line 2: the header has 2 columns, but this line has 3: .* quote fields that hold tabs",
    ),
]


@pytest.mark.parametrize("name, content, message", REFUSED)
def test_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_a_damaged_parquet_file_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [f"text number {i} {'x' * (i % 7)}" for i in range(3000)]
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 1000}
    parquet.write_table(pa.table({"text": texts, "label": [1] * 3000}), file, **options)
    content = file.read_bytes()
    start = content.index(b"text number 2500")
    file.write_bytes(content[:start] + b"\xff" + content[start + 1 :])  # not UTF-8 any more
    with pytest.raises(ValueError, match=r"a\.parquet: row 2501 cannot be read"):
        read_rows(file)
    file.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])  # and a length that is none
    with pytest.raises(ValueError, match=r"a\.parquet: row 2\d\d\d cannot be read"):
        read_rows(file)
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file"):
        read_rows(file)


@pytest.mark.parametrize("content", ['{"text": NaN, "label": 1}', '{"text": null, "label": 1}'])
def test_a_text_that_is_not_a_number_is_no_text(tmp_path: Path, content: str) -> None:
    from ept.tasks import load_split, local_task

    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "fine", "label": 1}) + "\n" + content + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: empty text \(column 'text'\)"):
        load_split(local_task("{text}", ["no", "yes"]), file)
