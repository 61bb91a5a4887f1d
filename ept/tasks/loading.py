"""A task's rows, from the hub or from files, as three checked splits without a text in common."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .base import Task, TaskData
from .formatting import FIELDS, missing_column, render, text_fields

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LARGE = 10_000
"""From this many train rows on, validation rows are taken from train and the validation split is the test split."""
LARGE_VALIDATION = 1_000
HELD_OUT_FRACTION = 0.1

Row = dict[str, Any]
File = str | PathLike[str]


def load_task(
    task: Task,
    *,
    data_dir: File | None = None,
    train_file: File | None = None,
    validation_file: File | None = None,
    test_file: File | None = None,
    labels: Literal["digits", "words"] = "digits",
    seed: int = 42,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
) -> TaskData:
    """The three splits of `task`, from `data_dir`, from the given files, or else from the hub.

    `data_dir` holds `{train,validation,test}.{jsonl,json,csv,parquet}` with the hub's columns. Splits that are missing,
    and a test split with hidden labels, are made with `seed`, as ATTEMPT and DePT make them where validation is there:

    * no test: below 10,000 train rows (or where the task says so) half of the validation split is the test split; from
      10,000 on, 1,000 train rows are the validation split and the validation split is the test split;
    * no validation: a tenth of train;
    * neither: 80/10/10 by a hash of the text, which does not depend on the order of the rows.

    Train rows whose text (case and white space aside) is also in validation or test are dropped, and validation rows
    whose text is also in test; a warning says how many. Last, `max_*` draws that many rows at random.

    Raises ValueError for bad content (with file and row), FileNotFoundError for a file or split that is not there, and
    ConnectionError where the hub cannot be reached.
    """
    target_strings = task.labels(labels)
    limits = {"train": max_train, "validation": max_validation, "test": max_test}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"max_{split}={limit}: give at least 1 row, or None for all")

    raw = _raw_splits(task, data_dir, {"train": train_file, "validation": validation_file, "test": test_file})
    if "test" in raw and _hidden(task, raw["test"][1]):
        logger.info("%s: the labels are hidden, the test split is made from the others", raw["test"][0])
        del raw["test"]
    splits = {split: _examples(task, rows, source) for split, (source, rows) in raw.items()}
    splits = _without_overlap(_three_splits(task, splits, seed))
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            splits[split] = [splits[split][i] for i in sorted(_permutation(len(splits[split]), seed)[:limit])]
    return TaskData(
        task=task, labels=target_strings, **{split: _dataset(rows, target_strings) for split, rows in splits.items()}
    )


def load_split(task: Task, path: File, *, labels: Literal["digits", "words"] = "digits") -> Dataset:
    """One labelled file as a data set with the columns of a `TaskData` split, in its order. Raises as `load_task`."""
    return _dataset(_examples(task, read_rows(path), str(path)), task.labels(labels))


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


def _raw_splits(
    task: Task, data_dir: File | None, files: Mapping[str, File | None]
) -> dict[str, tuple[str, list[Row]]]:
    """split -> (its source, for messages; its rows)"""
    given = {split: Path(file) for split, file in files.items() if file is not None}
    if data_dir is not None and given:
        raise ValueError(
            f"data_dir={str(data_dir)!r} and {', '.join(f'{s}_file' for s in given)}: give one or the other"
        )
    if data_dir is not None:
        given = _files_of(task, Path(data_dir))
    elif given and "train" not in given:
        raise ValueError(f"{', '.join(f'{split}_file' for split in given)} without train_file: give train_file as well")
    if given:
        return {split: (str(path), read_rows(path)) for split, path in given.items()}
    return _hub_splits(task)


def _files_of(task: Task, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder: data_dir must hold train{{{','.join(READERS)}}}")
    found: dict[str, Path] = {}
    for split, hub_name in zip(("train", "validation", "test"), task.split_names):
        for name in dict.fromkeys((hub_name, split)):
            paths = [path for suffix in READERS if (path := folder / f"{name}{suffix}").is_file()]
            if len(paths) > 1:
                raise ValueError(f"{folder} holds {', '.join(p.name for p in paths)}: keep one file for each split")
            if paths:
                found[split] = paths[0]
                break
    if "train" not in found:
        present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no train split: it needs train{{{','.join(READERS)}}}, it holds {present}"
        )
    return found


def _hub_splits(task: Task) -> dict[str, tuple[str, list[Row]]]:
    if task.hub is None:
        raise ValueError(f"task '{task.name}' is not on the hub: give data_dir or train_file")
    from datasets import load_dataset

    path, config = task.hub
    try:
        loaded = load_dataset(path, config)
    except OSError as error:  # datasets' own errors for an unreachable hub and for a missing data set are OSErrors
        raise ConnectionError(
            f"cannot load {path} ({config}) from the hub: {error}. Without a connection give data_dir, a folder with "
            f"train{{{','.join(READERS)}}} and validation, test alike, with the columns "
            f"{', '.join((*task.source_columns, task.label_column))}"
        ) from error
    named = {
        s: hub_name for s, hub_name in zip(("train", "validation", "test"), task.split_names) if hub_name in loaded
    }
    if "train" not in named:
        raise FileNotFoundError(f"{path} ({config}) has no split '{task.split_names[0]}', only {', '.join(loaded)}")
    return {split: (f"{path} ({config}) {hub_name}", loaded[hub_name].to_list()) for split, hub_name in named.items()}


def _hidden(task: Task, rows: Sequence[Row]) -> bool:
    """Whether every label is missing, or -1 without that being one of the task's labels."""
    labels = [row[task.label_column] for row in rows if task.label_column in row]
    return bool(labels) and all(str(v) in ("None", "", "-1", "-1.0") and task.label_class(v) is None for v in labels)


def _examples(task: Task, rows: Sequence[Row], source: str) -> list[Row]:
    """The rows as `{text, label, fields}`; raises ValueError with the source and the row (counted from 1)."""
    examples: list[Row] = []
    for number, row in enumerate(rows, start=1):
        try:
            if task.label_column not in row:
                raise ValueError(missing_column(task, task.label_column, row))
            fields = text_fields(task, row)
            label = task.label_class(row[task.label_column])
            if label is None:
                raise ValueError(
                    f"label {row[task.label_column]!r} (column '{task.label_column}') is outside the set: "
                    f"allowed are {task.allowed_labels}"
                )
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        examples.append({"text": render(task, {FIELDS: fields}), "label": label, FIELDS: fields})
    if not examples:
        raise ValueError(f"{source} is empty: it needs at least 1 row")
    return examples


def _three_splits(task: Task, splits: Mapping[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Makes the splits that are missing, by the rule in `load_task`."""
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    assert train is not None  # _raw_splits sees to it
    if validation is None and test is None:
        return _hash_split(train, seed)
    if validation is None:
        order = _permutation(len(train), seed)
        cut = max(1, round(HELD_OUT_FRACTION * len(train)))
        validation, train = _at(train, order[:cut]), _at(train, order[cut:])
        logger.info("no validation split: %d of the train rows serve as one", cut)
    elif test is None and len(train) >= LARGE and task.split_rule == "size":
        order = _permutation(len(train), seed)
        test = validation
        validation, train = _at(train, order[:LARGE_VALIDATION]), _at(train, order[LARGE_VALIDATION:])
        logger.info("no test split: it is the validation split, %d train rows are validation", LARGE_VALIDATION)
    elif test is None:
        order = _permutation(len(validation), seed)
        half = len(validation) // 2
        logger.info("no test split: half of the %d validation rows serve as one", len(validation))
        validation, test = _at(validation, order[:half]), _at(validation, order[half:])
    assert test is not None
    return _all_filled({"train": train, "validation": validation, "test": test})


def _hash_split(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """80/10/10 over the distinct texts in the order of their seeded hashes; equal texts stay together."""

    def rank(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=16).digest()

    keys = [text_key(row["text"]) for row in rows]
    distinct = sorted(set(keys), key=rank)
    if len(distinct) < 3:
        raise ValueError(f"{len(distinct)} distinct texts cannot fill train, validation and test: give at least 3")
    held_out = max(1, round(HELD_OUT_FRACTION * len(distinct)))
    split_of = {
        key: "test" if i < held_out else "validation" if i < 2 * held_out else "train" for i, key in enumerate(distinct)
    }
    logger.info("no validation and no test split: 80/10/10 of the %d distinct texts, by hash", len(distinct))
    return {
        split: [row for row, key in zip(rows, keys) if split_of[key] == split]
        for split in ("train", "validation", "test")
    }


def _without_overlap(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Drops from train what is in validation or test, from validation what is in test."""
    test_keys = {text_key(row["text"]) for row in splits["test"]}
    held_out_keys = test_keys | {text_key(row["text"]) for row in splits["validation"]}
    kept = {
        "train": [row for row in splits["train"] if text_key(row["text"]) not in held_out_keys],
        "validation": [row for row in splits["validation"] if text_key(row["text"]) not in test_keys],
        "test": splits["test"],
    }
    for split, others in (("train", "validation or test"), ("validation", "test")):
        dropped = len(splits[split]) - len(kept[split])
        if dropped:
            logger.warning(
                "dropped %d of %d %s rows: their text is also in %s", dropped, len(splits[split]), split, others
            )
    return _all_filled(kept)


def _all_filled(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    for split, rows in splits.items():
        if not rows:
            sizes = ", ".join(f"{name}: {len(r)}" for name, r in splits.items())
            raise ValueError(f"no rows are left for {split} ({sizes}): give more distinct texts, or a {split} split")
    return splits


def text_key(text: str) -> str:
    """What two texts have in common when they count as the same one: all but case and white space."""
    return " ".join(text.casefold().split())


def _permutation(size: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def _at(rows: Sequence[Row], positions: Sequence[int]) -> list[Row]:
    return [rows[i] for i in positions]


def _dataset(examples: Sequence[Row], labels: Sequence[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([{**row, "target": labels[row["label"]]} for row in examples])
