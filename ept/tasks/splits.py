"""A task's rows, from the Hub or from files, as three checked splits with no text in common."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from statistics import multimode
from typing import TYPE_CHECKING, Any, Literal

from ..utils.messages import listed
from .drawing import BALANCE_INTERVALS, SPLITS, few_shot, interval, sample, three_splits
from .files import File, Row, read_rows
from .metrics import compute_metrics, compute_text_metrics
from .rows import HIDDEN, ROW, dataset, examples, is_missing, text_key, with_all_columns
from .sources import RawSplits, raw_splits
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class TaskData:
    """A task's three splits; no text is in two of them.

    Each row has `text: str` (the rendered input), `label: int` (the class), `target: str` (`labels[label]`, or the
    free-text answer), `fields` (the text columns from which `text` was rendered) and `row: int` (its number in the
    file, counted from 1). A regression adds `number: float`, and tasks with `group_columns` add `group: int`, the same
    for rows that belong together.

    Attributes:
        commonest: the commonest label, or free-text answer, of the train rows before `max_train` and `k_shot`.
        left_out: number of rows left out, by reason.
        sources: for each split, the given split from which it was taken and the checksum of that one's rows.
        unread: columns of the user's own train rows that are neither text nor answer.
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]
    commonest: int | str
    left_out: dict[str, int] = field(default_factory=dict)
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def drawn(self) -> dict[str, Any]:
        """Describes the splits by their row numbers, from which `load_task` can draw them again."""
        described = {}
        for split, (source, checksum) in self.sources.items():
            described[split] = {"from": source, "sha256": checksum, "rows": list(getattr(self, split)[ROW])}
        return described

    def balance(self) -> dict[str, float]:
        """Returns each label's share of the train rows, by its word; a regression's range is divided into five.

        Empty for free-text answers.
        """
        names, labels, values = self.task.label_words, list(self.train["label"]), self.task.values
        if values:
            low, width = values[0], (values[-1] - values[0]) / BALANCE_INTERVALS
            labels = [interval(self.task, label) for label in labels]
            names = tuple(f"{low + i * width:g} .. {low + (i + 1) * width:g}" for i in range(BALANCE_INTERVALS))
        counts = Counter(labels)
        return {name: counts[i] / len(labels) for i, name in enumerate(names)}

    def majority(self) -> float:
        """Returns the test score, by the first metric, of always answering `commonest`."""
        answers: list[Any] = [self.commonest] * len(self.test)
        metric = self.task.metrics[0]
        if self.task.is_text:
            return compute_text_metrics([metric], answers, self.test["target"][:])[metric]
        references = list(self.test["label"])
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
    encoding: str | None = None,
    strict: bool = True,
    drawn: Mapping[str, Any] | None = None,
    raw: RawSplits | None = None,
) -> TaskData:
    """Loads the three splits of `task` from `data_dir`, from the given files, or else from the Hub.

    `data_dir` holds `{train,validation,test}.{jsonl,json,csv,tsv,parquet}` with the Hub's columns. Missing splits,
    and a test split with hidden labels, are made with `seed`; if there is a validation split, as in ATTEMPT and DePT:

    * no test: below 10,000 train rows (or if the task says so), half of the validation split becomes the test split;
      from 10,000 on, 1,000 train rows become the validation split and the validation split becomes the test split;
    * no validation: a tenth of train;
    * neither: 80/10/10.

    The last two, and for a local task the first as well, are drawn by a hash of the raw row, which depends neither on
    the order of the rows nor on the template. Each split gets its share of every label, and identical rows stay in one.

    Train rows whose text (ignoring case and white space) is also in validation or test are dropped, and validation rows
    whose text is also in test; a warning says how many. Then `max_*` draws that many rows at random. Rows that belong
    together (answers to one question of MultiRC) are never separated; the papers' code separates them.

    Last, `k_shot` draws the train rows of a few-shot run with `shot_seed`: this many in total, equally many of each
    label (`k_shot // labels`, as in DePT's code) or of each half of a regression's range.

    Args:
        encoding: of text files, as in `read_rows`.
        strict: refuses rows with blank text or without a label. False: leaves them out, with a warning.
        drawn: what `TaskData.drawn` returned; the same rows of the same data are drawn again.
        raw: the rows of these data, if they have been read already.

    Raises ValueError for bad content (with file and row), FileNotFoundError for a missing file or split, and
    ConnectionError if the Hub cannot be reached.
    """
    targets = task.labels(labels)
    limits = {"train": max_train, "validation": max_validation, "test": max_test}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"max_{split}={limit}: give at least 1 row, or None for all")

    files = dict(zip(SPLITS, (train_file, validation_file, test_file)))
    if raw is None:
        raw = raw_splits(
            data_dir,
            files,
            encoding,
            hub=task.hub,
            hub_names=task.split_names,
            columns=(*task.source_columns, task.label_column),
            names_labels=task.is_local,
        )
    source, rows = raw.get("test", ("", []))
    if rows and _is_unlabelled(task, rows):
        level = logging.WARNING if task.is_local else logging.INFO
        logger.log(level, "%s: no row has a label or an answer, the test split is made from the others", source)
        raw = {split: found for split, found in raw.items() if split != "test"}
    checksums = {split: checksum_of(rows) for split, (_, rows) in raw.items()}
    given, left_out = {}, Counter[str]()
    for split, (source, rows) in raw.items():
        given[split], omitted = examples(task, rows, source, strict, clamp=task.is_local and split != "train")
        left_out.update({why: len(numbers) for why, numbers in omitted.items()})
        _warn_left_out(source, omitted)
    if drawn is not None:
        origins, splits = _drawn_before(given, checksums, drawn)
    else:
        origins, splits = three_splits(task, given, seed)
    splits = {split: [row for row in rows if row["text"]] for split, rows in splits.items()}  # without blank ones
    unread = _unread(task, raw["train"][1])
    splits = _without_overlap(splits, unread)
    commonest = _commonest(task, given[origins["train"]], [row for split in SPLITS[1:] for row in splits[split]])
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            kept = {id(row) for row in sample(splits[split], limit, seed)[0]}
            splits[split] = [row for row in splits[split] if id(row) in kept]
    if k_shot is not None:
        splits["train"] = few_shot(task, splits["train"], k_shot, shot_seed)
    return TaskData(
        task,
        **{split: dataset(rows, targets) for split, rows in splits.items()},
        labels=targets,
        commonest=commonest,
        left_out=dict(left_out),
        sources={split: (origin, checksums[origin]) for split, origin in origins.items()},
        unread=unread,
    )


def load_split(
    task: Task,
    path: File,
    *,
    labels: Literal["digits", "words"] = "digits",
    encoding: str | None = None,
    strict: bool = True,
    names: Mapping[str, str] | None = None,
) -> Dataset:
    """Loads one labelled file with the columns of a `TaskData` split, in file order. Raises as `load_task` does.

    Args:
        names: the file's names of columns, by their names in the task.
    """
    rows = read_rows(path, encoding, names_labels=task.is_local)
    if names:
        rows = with_all_columns(rows)
        if absent := [column for column in names.values() if column not in rows[0]]:
            raise ValueError(f"{path}: no column '{absent[0]}'; columns found: {', '.join(map(repr, rows[0]))}")
        rows = [{**row, **{name: row[column] for name, column in names.items()}} for row in rows]
    found, omitted = examples(task, rows, str(path), strict, clamp=task.is_local)
    _warn_left_out(str(path), omitted)
    found = [row for row in found if row["text"]]
    if not found:
        raise ValueError(f"{path}: no row has both text and label")
    return dataset(found, task.labels(labels))


def _is_unlabelled(task: Task, rows: Sequence[Row]) -> bool:
    """Checks whether no row of a test split has a label or an answer: all are missing, or -1."""
    columns = task.target_columns
    if task.is_chat or not (task.is_local or all(column in row for row in rows for column in columns)):
        return False
    values = [row.get(column) for row in rows for column in columns]
    if task.is_text:
        return all(map(is_missing, values))
    return all(is_missing(v) or (str(v) in HIDDEN and task.label_class(v) is None) for v in values)


def _warn_left_out(source: str, omitted: Mapping[str, Sequence[int]]) -> None:
    for why, numbers in omitted.items():
        many, numbered = ("rows", "are") if len(numbers) > 1 else ("row", "is"), listed(map(str, numbers))
        logger.warning("%s: %d %s with %s %s left out: %s", source, len(numbers), many[0], why, many[1], numbered)


def _unread(task: Task, rows: Sequence[Row]) -> tuple[str, ...]:
    """Lists the columns of local rows that the task does not read."""
    read = {*task.source_columns, *task.target_columns}
    return tuple(dict.fromkeys(name for row in rows for name in row if name not in read)) if task.is_local else ()


def checksum_of(rows: Sequence[Row]) -> str:
    """Computes the checksum of raw rows."""
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _drawn_before(
    given: Mapping[str, list[Row]], checksums: Mapping[str, str], drawn: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, list[Row]]]:
    """Draws the rows that `TaskData.drawn` described; raises ValueError if the data have changed."""
    origins, splits = {}, {}
    for split in SPLITS:
        origin = origins[split] = drawn[split]["from"]
        if checksums.get(origin) != drawn[split]["sha256"]:
            raise ValueError(
                f"the {origin} data have changed since these splits were drawn, or are different data: give the same "
                "file, or leave data.splits out to draw new splits"
            )
        numbers = set(drawn[split]["rows"])
        splits[split] = [row for row in given[origin] if row[ROW] in numbers]
    return origins, splits


def _commonest(task: Task, rows: Sequence[Row], held_out: Sequence[Row]) -> Any:
    """Finds the commonest answer (the lowest, if tied) of the rows that are neither held out nor blank."""
    held = set(map(id, held_out))
    answer = "target" if task.is_text else "label"
    return min(multimode(row[answer] for row in rows if row["text"] and id(row) not in held))


def _without_overlap(splits: Mapping[str, list[Row]], unread: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Drops train texts that are in validation or test, and validation texts in test; refuses an empty split.

    The error names the `unread` columns, which may distinguish rows of one text.
    """
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
        remedy = f"give more distinct texts, or a {empty[0]} split"
        if unread:
            named = listed(map(repr, unread))
            remedy = (
                f"too few texts differ, and the model does not read {named}: name every column to read with "
                f"--text-column, or {remedy}"
            )
        raise ValueError(f"no rows are left for {empty[0]} ({sizes}): {remedy}")
    return kept
