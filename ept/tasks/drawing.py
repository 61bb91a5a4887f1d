"""Drawing rows: missing splits, part of a split, the rows of a few-shot run."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, chain
from typing import Any

from .files import Row
from .rows import GROUP, RAW
from .task import Task

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LARGE = 10_000
"""With at least this many train rows, validation rows are taken from train and the validation split becomes the test
split."""
LARGE_VALIDATION = 1_000
HELD_OUT_FRACTION = 0.1
BALANCE_INTERVALS = 5  # of a regression's range, for counting its labels


def three_splits(task: Task, given: Mapping[str, list[Row]], seed: int) -> tuple[dict[str, str], dict[str, list[Row]]]:
    """Makes missing splits by the rules in `load_task`; also returns the given split that each one comes from."""
    train, validation, test = given["train"], given.get("validation"), given.get("test")
    origins = dict(zip(SPLITS, SPLITS))
    if validation is None and test is None:
        origins = dict.fromkeys(SPLITS, "train")
        test, validation, train = _stratified(task, train, HELD_OUT_FRACTION, 2, seed)
        logger.info("no validation and no test split: 80/10/10 of the rows, by hash")
    elif validation is None:
        origins["validation"] = "train"
        validation, train = _stratified(task, train, HELD_OUT_FRACTION, 1, seed)
        logger.info("no validation split: %d of the train rows serve as one", len(validation))
    elif test is None and len(train) >= LARGE and task.split_rule == "size":
        origins = {"train": "train", "validation": "train", "test": "validation"}
        test = validation
        if task.is_local:
            validation, train = _stratified(task, train, LARGE_VALIDATION / len(train), 1, seed)
        else:
            validation, train = sample(train, LARGE_VALIDATION, seed)
        logger.info("no test split: it is the validation split, %d train rows are validation", len(validation))
    elif test is None:
        origins["test"] = "validation"
        logger.info("no test split: half of the %d validation rows serve as one", len(validation))
        if task.is_local:
            test, validation = _stratified(task, validation, 0.5, 1, seed)
        else:
            validation, test = sample(validation, len(validation) // 2, seed)
    return origins, dict(zip(SPLITS, (train, validation or [], test or [])))


def _stratified(task: Task, rows: Sequence[Row], share: float, parts: int, seed: int) -> list[list[Row]]:
    """Draws `parts` parts, each this share of the distinct rows and of every label; the rest comes last.

    Equal rows, and rows of a group, stay together. They are ordered by a hash of the row and `seed`.
    """
    labels: dict[str, int] = {}
    keys = [row.get(GROUP) or row[RAW] for row in rows]
    for key, row in zip(keys, rows):
        labels[key] = min(labels.get(key, row["label"]), row["label"])
    if len(labels) <= parts:
        wanted = "train, validation and test" if parts == 2 else "two splits"
        raise ValueError(f"{len(labels)} distinct texts cannot fill {wanted}: give at least {parts + 1}")
    strata: dict[int, list[str]] = defaultdict(list)
    for key in sorted(labels, key=lambda key: blake2b(f"{seed}\n{key}".encode(), digest_size=16).digest()):
        strata[interval(task, labels[key])].append(key)
    counts = _held_out({label: len(members) for label, members in strata.items()}, share, parts)
    if counts is None:  # too few rows to stratify
        strata = {0: list(chain(*strata.values()))}
        counts = {0: max(1, round(share * len(labels)))}
    part_of = {}
    for label, members in strata.items():
        for position, key in enumerate(members):
            part_of[key] = min(position // counts[label], parts) if counts[label] else parts
    return [[row for row, key in zip(rows, keys) if part_of[key] == part] for part in range(parts + 1)]


def _held_out(sizes: Mapping[int, int], share: float, parts: int) -> dict[int, int] | None:
    """Counts the rows of each label to hold out in each part: its share, and at least one if it has five or more.

    Returns None if the labels have too few rows to reach the share overall.
    """
    counts = {label: max(int(share * size), int(size >= 5)) for label, size in sizes.items()}
    total = max(1, round(share * sum(sizes.values())))
    for label in sorted(sizes, key=lambda label: (counts[label] - share * sizes[label], label)):
        if sum(counts.values()) < total and (counts[label] + 1) * parts < sizes[label]:
            counts[label] += 1
    return counts if sum(counts.values()) >= total else None


def interval(task: Task, label: int) -> int:
    """Returns the stratum of a label: the label itself, or for a regression its interval of the range."""
    if not task.values:
        return label
    low, width = task.values[0], (task.values[-1] - task.values[0]) / BALANCE_INTERVALS
    return min(int((task.values[label] - low) / width), BALANCE_INTERVALS - 1)


def _permutation(size: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def sample(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draws `count` rows and returns them and the rest, in random order; the rows of a group stay together.

    Groups are drawn as long as they fit into `count`; the first is always drawn.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for position, row in enumerate(rows):
        groups[row.get(GROUP, position)].append(row)
    members = list(groups.values())
    shuffled = [members[i] for i in _permutation(len(members), seed)]
    cut = bisect_right(list(accumulate(map(len, shuffled))), count) or min(count, 1)
    return list(chain(*shuffled[:cut])), list(chain(*shuffled[cut:]))


def few_shot(task: Task, rows: Sequence[Row], k: int, seed: int) -> list[Row]:
    """Draws `k // classes` rows of each class, in file order; a regression's classes are the halves of its range.

    Raises:
        ValueError: `k` is below one row per class, or a class has too few rows.
    """
    values = task.values
    classes = 2 if values else max(task.num_labels, 1)  # free-text answers count as one class
    each = k // classes
    if each < 1:
        raise ValueError(f"k_shot={k} is less than one row for each of {classes} labels: give at least {classes}")
    members: dict[int, list[int]] = {index: [] for index in range(classes)}
    for position in _permutation(len(rows), seed):
        label = rows[position]["label"]
        members[int(values[label] > (values[0] + values[-1]) / 2) if values else label].append(position)
    fewest = min(map(len, members.values()))
    if fewest < each:
        raise ValueError(
            f"k_shot={k} needs {each} train rows of each label, but one label has {fewest}: give at most "
            f"k_shot={fewest * classes}"
        )
    return [rows[position] for position in sorted(i for drawn in members.values() for i in drawn[:each])]
