"""Splits of your own data: by the raw row, with each label's share, the same for every template, redrawn alike."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ept.tasks import TaskData, load_split, load_task, local_task

LABELS = {"a": "a", "b": "b", "c": "c"}
Rows = list[dict[str, Any]]


def rows(count: int = 200) -> Rows:
    """Makes rows of three labels, 70, 20 and 10 %, of which every tenth text is there twice."""
    labels = ["a"] * 14 + ["b"] * 4 + ["c"] * 2
    made = [{"id": i, "title": f"Title {i}", "text": f"text {i}", "label": labels[i % 20]} for i in range(count)]
    return made + [{**row, "id": row["id"] + count} for row in made[::10]]


def write(file: Path, rows: Rows) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def load(file: Path, template: str = "{text}", **options: Any) -> TaskData:
    return load_task(local_task(template, LABELS), train_file=file, labels="words", **options)


def ids(data: TaskData) -> list[set[int]]:
    return [set(split["row"]) for split in (data.train, data.validation, data.test)]


@pytest.mark.parametrize("other", ["Text: {text}\nLabel:", "{title} {text}", "{title}"])
def test_every_template_has_the_same_splits(tmp_path: Path, other: str) -> None:
    file = write(tmp_path / "a.csv", rows())
    assert ids(load(file)) == ids(load(file, other))


def test_each_label_has_its_share_and_no_text_is_in_two_splits(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.csv", rows()))
    texts = [set(split["text"]) for split in (data.train, data.validation, data.test)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 200
    assert sum(map(len, ids(data))) == 220  # duplicates are where their first one is, and none is lost
    for split, share in ((data.train, 0.8), (data.validation, 0.1), (data.test, 0.1)):
        distinct = Counter(dict(zip(split["text"], split["target"])).values())
        assert distinct == {"a": 140 * share, "b": 40 * share, "c": 20 * share}


def test_rows_differ_by_their_numbers_too(tmp_path: Path) -> None:
    """But not by a row's own number, because then the same text with two numbers would be in two splits."""
    made = [{"id": i, "age": 20 + i % 40, "job": "abc"[i % 3], "label": "ab"[i % 2]} for i in range(120)]
    data = load(write(tmp_path / "a.csv", made), "age {age} job {job}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [96, 12, 12]
    again = [{**row, "id": row["id"] + 120} for row in made]
    twice = load(write(tmp_path / "b.csv", made + again), "age {age} job {job}")
    assert [{n for n in numbers if n <= 120} for numbers in ids(twice)] == ids(data)
    assert all({n + 120 for n in numbers if n <= 120} <= numbers for numbers in ids(twice))


def test_a_rare_label_is_in_every_split(tmp_path: Path) -> None:
    few = [row for row in rows(400) if row["label"] != "c"] + [row for row in rows(400) if row["label"] == "c"][:5]
    data = load(write(tmp_path / "a.csv", few))
    assert all("c" in split["target"] for split in (data.train, data.validation, data.test))


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    first, shuffled = rows(), rows()
    random.Random(1).shuffle(shuffled)
    one, other = load(write(tmp_path / "a.csv", first)), load(write(tmp_path / "b.csv", shuffled))
    assert set(one.test["text"]) == set(other.test["text"])


@pytest.mark.parametrize("given", [("train", "test"), ("train", "validation")])
def test_a_part_of_a_given_split_is_drawn_alike_for_every_template(tmp_path: Path, given: tuple[str, str]) -> None:
    first, second = rows(), [{**row, "text": f"other {row['text']}", "title": "T"} for row in rows()]
    files = {f"{name}_file": write(tmp_path / f"{name}.csv", r) for name, r in zip(given, (first, second))}
    found = [load_task(local_task(template, LABELS), **files, labels="words") for template in ("{text}", "<{text}>")]
    assert ids(found[0]) == ids(found[1])
    assert Counter(found[0].validation["target"]).keys() == {"a", "b", "c"}


def test_blank_rows_and_missing_labels_are_left_out_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = rows()
    some[3]["text"], some[4]["text"], some[7]["label"] = "", "  ", ""
    some[8]["text"] = some[8]["label"] = ""  # is counted once
    file = write(tmp_path / "a.csv", some)
    data = load(file, strict=False)
    assert data.left_out == {"blank text": 2, "no label": 2}
    assert "a.csv: 2 rows with blank text are left out: 4, 5" in caplog.text
    assert "a.csv: 2 rows with no label are left out: 8, 9" in caplog.text
    assert set.union(*ids(data)) == set(range(1, 221)) - {4, 5, 8, 9}
    # The others are where they are for a template that has text for these rows.
    assert [left - {4, 5} for left in ids(load(file, "{title}", strict=False))] == ids(data)
    with pytest.raises(ValueError, match=r"a\.csv, row 4: empty text"):
        load(file)
    assert len(load_split(local_task("{text}", LABELS), file, strict=False)) == 216


def test_splits_are_drawn_again(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows())
    data = load(file, seed=7, max_train=50)
    drawn = json.loads(json.dumps(data.drawn()))
    again = load(file, "Other: {text}", drawn=drawn)
    assert ids(again) == ids(data) != ids(load(file))
    changed = rows()
    changed[5]["text"] = "changed"
    with pytest.raises(ValueError, match="the train data have changed since these splits were drawn"):
        load(write(file, changed), drawn=drawn)


def test_the_commonest_label_is_that_of_all_train_rows(tmp_path: Path) -> None:
    """Few-shot rows, with equally many of each label, do not show which label is the commonest."""
    file = write(tmp_path / "a.csv", [{**row, "label": {"a": "c", "c": "a"}.get(row["label"], "b")} for row in rows()])
    data = load(file, k_shot=6)
    assert Counter(data.train["target"]) == {"a": 2, "b": 2, "c": 2}
    again = load(file, drawn=data.drawn(), max_train=1)
    for found in (data, again):
        assert found.commonest == 2
        assert found.majority() == Counter(found.test["target"])["c"] / len(found.test) > 0.5


def test_the_commonest_text_is_that_of_all_train_rows(tmp_path: Path) -> None:
    made = [{"text": f"text {i}", "summary": "usual" if i % 3 else f"a rare one {i}"} for i in range(90)]
    task = local_task("{text}", (), target_template="{summary}", metrics=["exact_match"])
    data = load_task(task, train_file=write(tmp_path / "a.csv", made), k_shot=1, shot_seed=2)
    assert data.commonest == "usual" != data.train["target"][0]
    assert data.majority() == data.test["target"][:].count("usual") / len(data.test) > 0.5
