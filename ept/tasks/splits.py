"""A task's rows, from the hub or from files, as three checked splits without a text in common."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .files import READERS, File, Row, read_rows
from .rows import GROUP, dataset, examples, text_key
from .task import Task, TaskData

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LARGE = 10_000
"""From this many train rows on, validation rows are taken from train and the validation split is the test split."""
LARGE_VALIDATION = 1_000
HELD_OUT_FRACTION = 0.1


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
    k_shot: int | None = None,
    shot_seed: int = 0,
) -> TaskData:
    """The three splits of `task`, from `data_dir`, from the given files, or else from the hub.

    `data_dir` holds `{train,validation,test}.{jsonl,json,csv,parquet}` with the hub's columns. Splits that are missing,
    and a test split with hidden labels, are made with `seed`, as ATTEMPT and DePT make them where validation is there:

    * no test: below 10,000 train rows (or where the task says so) half of the validation split is the test split; from
      10,000 on, 1,000 train rows are the validation split and the validation split is the test split;
    * no validation: a tenth of train;
    * neither: 80/10/10 by a hash of the text, which does not depend on the order of the rows.

    Train rows whose text (case and white space aside) is also in validation or test are dropped, and validation rows
    whose text is also in test; a warning says how many. Then `max_*` draws that many rows at random. Rows that belong
    together (answers to one question of MultiRC) are never split, where the papers' code splits them.

    Last, `k_shot` draws the train rows of a few-shot run with `shot_seed`: so many in all, the same number of each
    label (`k_shot // labels`, as DePT's code does), of a regression of either half of its range.

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
    splits = {split: examples(task, rows, source) for split, (source, rows) in raw.items()}
    splits = _without_overlap(_three_splits(task, splits, seed))
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            order = _shuffled(splits[split], seed)
            splits[split] = _at(splits[split], sorted(order[: _whole_groups(splits[split], order, limit)]))
    if k_shot is not None:
        splits["train"] = few_shot(task, splits["train"], k_shot, shot_seed)
    return TaskData(
        task=task, labels=target_strings, **{split: dataset(rows, target_strings) for split, rows in splits.items()}
    )


def load_split(task: Task, path: File, *, labels: Literal["digits", "words"] = "digits") -> Dataset:
    """One labelled file as a data set with the columns of a `TaskData` split, in its order. Raises as `load_task`."""
    return dataset(examples(task, read_rows(path), str(path)), task.labels(labels))


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


def _three_splits(task: Task, splits: Mapping[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Makes the splits that are missing, by the rule in `load_task`."""
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    assert train is not None  # _raw_splits sees to it
    if validation is None and test is None:
        return _hash_split(train, seed)
    if validation is None:
        order = _shuffled(train, seed)
        cut = _whole_groups(train, order, max(1, round(HELD_OUT_FRACTION * len(train))))
        validation, train = _at(train, order[:cut]), _at(train, order[cut:])
        logger.info("no validation split: %d of the train rows serve as one", cut)
    elif test is None and len(train) >= LARGE and task.split_rule == "size":
        order = _shuffled(train, seed)
        cut = _whole_groups(train, order, LARGE_VALIDATION)
        test = validation
        validation, train = _at(train, order[:cut]), _at(train, order[cut:])
        logger.info("no test split: it is the validation split, %d train rows are validation", cut)
    elif test is None:
        order = _shuffled(validation, seed)
        half = _whole_groups(validation, order, len(validation) // 2)
        logger.info("no test split: half of the %d validation rows serve as one", len(validation))
        validation, test = _at(validation, order[:half]), _at(validation, order[half:])
    assert test is not None
    return _all_filled({"train": train, "validation": validation, "test": test})


def _hash_split(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """80/10/10 over the distinct texts in the order of their seeded hashes; equal texts stay together."""

    def rank(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=16).digest()

    keys = [row.get(GROUP) or text_key(row["text"]) for row in rows]
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


def _permutation(size: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def _shuffled(rows: Sequence[Row], seed: int) -> list[int]:
    """The positions of the rows in random order; those of one group, if there are any, stay together."""
    groups: dict[Any, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row.get(GROUP, position), []).append(position)
    members = list(groups.values())
    return [position for i in _permutation(len(members), seed) for position in members[i]]


def _whole_groups(rows: Sequence[Row], order: Sequence[int], cut: int) -> int:
    """`cut`, moved so that it falls between two groups of `order`: back, or forward where nothing would be left."""

    def splits_group(at: int) -> bool:
        return 0 < at < len(order) and GROUP in rows[0] and rows[order[at - 1]][GROUP] == rows[order[at]][GROUP]

    back = cut
    while splits_group(back):
        back -= 1
    while splits_group(cut):
        cut += 1
    return back or cut


def few_shot(task: Task, rows: Sequence[Row], k: int, seed: int) -> list[Row]:
    """`k // classes` rows of each class, drawn with `seed`, in their order; the classes of a regression are its halves.

    Raises:
        ValueError: that is no row a class, or a class has fewer rows.
    """

    def class_of(row: Row) -> int:
        return int(task.values[row["label"]] > (task.values[0] + task.values[-1]) / 2) if task.values else row["label"]

    classes = 2 if task.values else task.num_labels
    each = k // classes
    if each < 1:
        raise ValueError(f"k_shot={k} is no row for each of {classes} labels: give at least {classes}")
    drawn: dict[int, list[int]] = {index: [] for index in range(classes)}
    for position in _permutation(len(rows), seed):
        if len(members := drawn[class_of(rows[position])]) < each:
            members.append(position)
    fewest = min(map(len, drawn.values()))
    if fewest < each:
        raise ValueError(
            f"k_shot={k} needs {each} train rows of each label, one label has {fewest}: "
            f"give at most k_shot={fewest * classes}"
        )
    return _at(rows, sorted(position for members in drawn.values() for position in members))


def _at(rows: Sequence[Row], positions: Sequence[int]) -> list[Row]:
    return [rows[i] for i in positions]
