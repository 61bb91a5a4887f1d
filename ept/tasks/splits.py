"""A task's rows, from the hub or from files, as three checked splits without a text in common."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from statistics import multimode
from typing import TYPE_CHECKING, Any, Literal

from .files import READERS, File, Row, read_rows
from .metrics import compute_metrics
from .rows import GROUP, dataset, examples, text_key
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
TRAIN_FILE = f"train{{{','.join(READERS)}}}"
LARGE = 10_000
"""From this many train rows on, validation rows are taken from train and the validation split is the test split."""
LARGE_VALIDATION = 1_000
HELD_OUT_FRACTION = 0.1
BALANCE_INTERVALS = 5  # of a regression's range, when its labels are counted


@dataclass
class TaskData:
    """A task's three splits, no text in two of them.

    Each row has `text: str` (the rendered input), `label: int` (the class), `target: str` (`labels[label]`) and
    `fields`: the text columns that `text` was rendered from. Tasks with `group_columns` have `group: int` as well, the
    same number for rows that belong together.
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]

    def balance(self) -> dict[str, float]:
        """Gives the share of each label among the train rows, by its word; a regression's range is cut into five."""
        names, labels, values = self.task.label_words, list(self.train["label"]), self.task.values
        if values:
            low, width = values[0], (values[-1] - values[0]) / BALANCE_INTERVALS
            labels = [min(int((values[label] - low) / width), BALANCE_INTERVALS - 1) for label in labels]
            names = tuple(f"{low + i * width:g}-{low + (i + 1) * width:g}" for i in range(BALANCE_INTERVALS))
        counts = Counter(labels)
        return {name: counts[i] / len(labels) for i, name in enumerate(names)}

    def majority(self) -> float:
        """Scores the commonest train label (the lowest of equals) as every answer on `test`, by the first metric."""
        metric, references = self.task.metrics[0], list(self.test["label"])
        answers = [min(multimode(self.train["label"]))] * len(references)
        return compute_metrics([metric], answers, references, self.task.num_labels, values=self.task.values)[metric]


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
    """Loads the three splits of `task` from `data_dir`, from the given files, or else from the hub.

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
    label (`k_shot // labels`, as DePT's code does), or of either half of a regression's range.

    Raises ValueError for bad content (with file and row), FileNotFoundError for a file or split that is not there, and
    ConnectionError where the hub cannot be reached.
    """
    targets = task.labels(labels)
    limits = {"train": max_train, "validation": max_validation, "test": max_test}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"max_{split}={limit}: give at least 1 row, or None for all")

    raw = _raw_splits(task, data_dir, dict(zip(SPLITS, (train_file, validation_file, test_file))))
    source, rows = raw.get("test", ("", []))
    test_labels = [row[task.label_column] for row in rows if task.label_column in row]
    # Hidden: all are missing, or -1 without that being one of the task's labels.
    if test_labels and all(str(v) in ("None", "", "-1", "-1.0") and task.label_class(v) is None for v in test_labels):
        logger.info("%s: the labels are hidden, the test split is made from the others", source)
        del raw["test"]
    splits = {split: examples(task, rows, source) for split, (source, rows) in raw.items()}
    splits = _without_overlap(_three_splits(task, splits, seed))
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            kept = {id(row) for row in _drawn(splits[split], limit, seed)[0]}
            splits[split] = [row for row in splits[split] if id(row) in kept]
    if k_shot is not None:
        splits["train"] = few_shot(task, splits["train"], k_shot, shot_seed)
    return TaskData(task, **{split: dataset(rows, targets) for split, rows in splits.items()}, labels=targets)


def load_split(task: Task, path: File, *, labels: Literal["digits", "words"] = "digits") -> Dataset:
    """Loads one labelled file with the columns of a `TaskData` split, in the file's order. Raises as `load_task`."""
    return dataset(examples(task, read_rows(path), str(path)), task.labels(labels))


def _raw_splits(
    task: Task, data_dir: File | None, files: Mapping[str, File | None]
) -> dict[str, tuple[str, list[Row]]]:
    """Reads the splits that are there: the source of each, for messages, and its rows."""
    given = {split: Path(file) for split, file in files.items() if file is not None}
    names = ", ".join(f"{split}_file" for split in given)
    if data_dir is not None:
        folder = Path(data_dir)
        if given:
            raise ValueError(f"data_dir={str(data_dir)!r} and {names}: give one or the other")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder: data_dir must hold {TRAIN_FILE}")
        for split, hub_name in zip(SPLITS, task.split_names):
            paths = [folder / f"{name}{suffix}" for name in (hub_name, split) for suffix in READERS]
            found = [path for path in dict.fromkeys(paths) if path.is_file()]
            found = [path for path in found if path.stem == found[0].stem]
            if len(found) > 1:
                raise ValueError(f"{folder} holds {', '.join(p.name for p in found)}: keep one file for each split")
            if found:
                given[split] = found[0]
        if "train" not in given:
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{folder} has no train split: it needs {TRAIN_FILE}, it holds {present}")
    elif given and "train" not in given:
        raise ValueError(f"{names} without train_file: give train_file as well")
    if given:
        return {split: (str(path), read_rows(path)) for split, path in given.items()}
    if task.hub is None:
        raise ValueError(f"task '{task.name}' is not on the hub: give data_dir or train_file")
    return _hub_splits(task, *task.hub)


def _hub_splits(task: Task, path: str, config: str) -> dict[str, tuple[str, list[Row]]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(path, config)
    except OSError as error:  # datasets' own errors for an unreachable hub and for a missing data set are OSErrors
        raise ConnectionError(
            f"cannot load {path} ({config}) from the hub: {error}. Without a connection give data_dir, a folder with "
            f"{TRAIN_FILE} and validation, test alike, with the columns "
            f"{', '.join((*task.source_columns, task.label_column))}"
        ) from error
    if task.split_names[0] not in loaded:
        raise FileNotFoundError(f"{path} ({config}) has no split '{task.split_names[0]}', only {', '.join(loaded)}")
    return {
        split: (f"{path} ({config}) {hub_name}", loaded[hub_name].to_list())
        for split, hub_name in zip(SPLITS, task.split_names)
        if hub_name in loaded
    }


def _three_splits(task: Task, splits: Mapping[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Makes the splits that are missing, by the rule in `load_task`."""
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if validation is None and test is None:
        keys = [row.get(GROUP) or text_key(row["text"]) for row in train]  # equal texts stay together
        distinct = sorted(set(keys), key=lambda key: blake2b(f"{seed}\n{key}".encode(), digest_size=16).digest())
        if len(distinct) < 3:
            raise ValueError(f"{len(distinct)} distinct texts cannot fill train, validation and test: give at least 3")
        logger.info("no validation and no test split: 80/10/10 of the %d distinct texts, by hash", len(distinct))
        held_out = max(1, round(HELD_OUT_FRACTION * len(distinct)))
        ranges = (distinct[2 * held_out :], distinct[held_out : 2 * held_out], distinct[:held_out])
        split_of = {key: split for split, members in zip(SPLITS, ranges) for key in members}
        return {split: [row for row, key in zip(train, keys) if split_of[key] == split] for split in SPLITS}
    if validation is None:
        validation, train = _drawn(train, max(1, round(HELD_OUT_FRACTION * len(train))), seed)
        logger.info("no validation split: %d of the train rows serve as one", len(validation))
    elif test is None and len(train) >= LARGE and task.split_rule == "size":
        test = validation
        validation, train = _drawn(train, LARGE_VALIDATION, seed)
        logger.info("no test split: it is the validation split, %d train rows are validation", len(validation))
    elif test is None:
        logger.info("no test split: half of the %d validation rows serve as one", len(validation))
        validation, test = _drawn(validation, len(validation) // 2, seed)
    return dict(zip(SPLITS, (train, validation, test or [])))


def _without_overlap(splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Drops from train what is in validation or test, from validation what is in test; refuses an empty split."""
    keys = {split: [text_key(row["text"]) for row in rows] for split, rows in splits.items()}
    kept = dict(splits)
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        held_out = {key for other in others for key in keys[other]}
        kept[split] = [row for row, key in zip(splits[split], keys[split]) if key not in held_out]
        if dropped := len(keys[split]) - len(kept[split]):
            message = "dropped %d of %d %s rows: their text is also in %s"
            logger.warning(message, dropped, len(keys[split]), split, " or ".join(others))
    if empty := [split for split, rows in kept.items() if not rows]:
        sizes = ", ".join(f"{split}: {len(rows)}" for split, rows in kept.items())
        raise ValueError(f"no rows are left for {empty[0]} ({sizes}): give more distinct texts, or a {empty[0]} split")
    return kept


def _permutation(size: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def _drawn(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draws `count` rows, and gives them and the rest in random order; the rows of a group stay together.

    Groups are drawn while they fit into `count`, and the first one in any case.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for position, row in enumerate(rows):
        groups[row.get(GROUP, position)].append(row)
    members = list(groups.values())
    shuffled = [members[i] for i in _permutation(len(members), seed)]
    cut = bisect_right(list(accumulate(map(len, shuffled))), count) or min(count, 1)
    return list(chain(*shuffled[:cut])), list(chain(*shuffled[cut:]))


def few_shot(task: Task, rows: Sequence[Row], k: int, seed: int) -> list[Row]:
    """Draws `k // classes` rows of each class with `seed`, in their order; a regression's classes are its two halves.

    Raises:
        ValueError: that is no row a class, or a class has fewer rows.
    """
    values = task.values
    classes = 2 if values else task.num_labels
    each = k // classes
    if each < 1:
        raise ValueError(f"k_shot={k} is no row for each of {classes} labels: give at least {classes}")
    members: dict[int, list[int]] = {index: [] for index in range(classes)}
    for position in _permutation(len(rows), seed):
        label = rows[position]["label"]
        members[int(values[label] > (values[0] + values[-1]) / 2) if values else label].append(position)
    fewest = min(map(len, members.values()))
    if fewest < each:
        raise ValueError(
            f"k_shot={k} needs {each} train rows of each label, one label has {fewest}: "
            f"give at most k_shot={fewest * classes}"
        )
    return [rows[position] for position in sorted(i for drawn in members.values() for i in drawn[:each])]
