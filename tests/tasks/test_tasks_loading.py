"""load_task: sources, label forms, split rules, leakage, sampling, and one clear message for each kind of bad data."""

import csv
import json
import logging
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from ept.tasks import TaskData, get_task, load_split, load_task, local_task, read_rows
from ept.tasks.splits import text_key

SST2, RTE, CB = get_task("glue/sst2"), get_task("glue/rte"), get_task("super_glue/cb")


def sst2_rows(first, count):
    return [{"sentence": f"film number {i}", "label": i % 2, "idx": i} for i in range(first, first + count)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def write_splits(folder, suffix=".jsonl", **splits):
    for name, rows in splits.items():
        write(folder / f"{name}{suffix}", rows)
    return folder


def texts(split):
    return list(split["text"])


def sizes(data):
    return [len(split) for split in (data.train, data.validation, data.test)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_data_dir(tmp_path, suffix):
    rows = sst2_rows(0, 12)
    rows[0]["sentence"] = 'NA, "quoted"\nsecond line, 007'
    rows[1]["sentence"] = "None"
    write_splits(tmp_path, suffix, train=rows, validation=sst2_rows(20, 4), test=sst2_rows(30, 2))
    data = load_task(SST2, data_dir=tmp_path)
    assert isinstance(data, TaskData)
    assert (data.task, data.labels) == (SST2, ("0", "1"))
    assert sizes(data) == [12, 4, 2]
    text = rows[0]["sentence"]
    assert data.train[0] == {
        "text": f"sentence: {text}",
        "label": 0,
        "fields": {"sentence": text},
        "row": 1,
        "target": "0",
    }
    assert data.train[1]["text"] == "sentence: None"
    assert list(data.train["label"]) == [0, 1] * 6
    assert list(load_task(SST2, data_dir=str(tmp_path), labels="words").test["target"]) == ["negative", "positive"]


@pytest.mark.parametrize("name", ["valid", "val", "dev", "Validation"])
def test_other_names_of_the_validation_file(tmp_path, name, caplog):
    write_splits(tmp_path, train=sst2_rows(0, 12), **{name: sst2_rows(20, 4)}, extra=sst2_rows(30, 2))
    data = load_task(SST2, data_dir=tmp_path)
    given = {f"sentence: {row['sentence']}" for row in sst2_rows(20, 4)}
    assert set(texts(data.validation) + texts(data.test)) == given  # two halves of a small one
    assert "extra.jsonl is not a train, validation or test file and is not read" in caplog.text
    write_splits(tmp_path, ".json", **{name: sst2_rows(20, 4)})
    with pytest.raises(ValueError, match=rf"holds {name}.jsonl, {name}.json: keep one file for each split"):
        load_task(SST2, data_dir=tmp_path)


@pytest.mark.parametrize("form", ["saved", "a split saved", "a copy of the hub's", "a copy in data/"])
def test_folders_as_datasets_and_the_hub_have_them(tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, names = tmp_path / "folder", datasets.ClassLabel(names=["bad", "good"])
    parts = {"train": sst2_rows(0, 20), "valid": sst2_rows(20, 6), "test": sst2_rows(30, 4)}
    parts = {k: datasets.Dataset.from_list(rows).cast_column("label", names) for k, rows in parts.items()}
    if form == "saved":
        datasets.DatasetDict(parts).save_to_disk(folder)
    elif form == "a split saved":
        parts["train"].save_to_disk(folder)
    else:
        place = folder / "data" if "data/" in form else folder
        place.mkdir(parents=True)
        for name, rows in parts.items():
            for i in (0, 1):
                rows.shard(2, i).to_parquet(place / f"{name}-{i:05}-of-00002.parquet")
        (folder / "README.md").write_text("a data set")
    expected = [16, 2, 2] if form == "a split saved" else [20, 6, 4]
    assert sizes(load_task(SST2, data_dir=folder)) == expected
    task = local_task("{sentence}", ["bad", "good"])
    data = load_task(task, data_dir=folder, labels="words")
    assert sizes(data) == expected
    for row in (*data.train, *data.validation, *data.test):
        assert row["target"] == ["bad", "good"][int(row["text"].split()[-1]) % 2]


def test_a_parquet_file_gives_the_names_of_its_labels(tmp_path):
    rows = datasets.Dataset.from_list([*sst2_rows(0, 20), {"sentence": "film number 20", "label": -1, "idx": 20}])
    rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"])).to_parquet(tmp_path / "a.parquet")
    task = local_task("{sentence}", ["bad", "good"])
    found = load_split(task, tmp_path / "a.parquet", labels="words", strict=False)
    assert found["target"][:] == ["bad", "good"] * 10
    data = load_task(task, train_file=tmp_path / "a.parquet", labels="words", strict=False)
    assert {row["text"] + row["target"] for row in data.train} <= {
        a + b for a, b in zip(found["text"], found["target"])
    }
    assert load_split(SST2, tmp_path / "a.parquet", strict=False)["label"][:] == [0, 1] * 10


def test_a_saved_folder_that_is_damaged_is_named(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(sst2_rows(0, 8))).save_to_disk(tmp_path / "x")
    next((tmp_path / "x" / "train").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="x holds a dataset that cannot be loaded"):
        load_task(SST2, data_dir=tmp_path / "x")


def test_files(tmp_path):
    files = {
        "train_file": write(tmp_path / "a.csv", sst2_rows(0, 5)),
        "validation_file": write(tmp_path / "b.jsonl", sst2_rows(5, 2)),
        "test_file": str(write(tmp_path / "c.parquet", sst2_rows(7, 3))),
    }
    data = load_task(SST2, **files)
    assert sizes(data) == [5, 2, 3]


def test_json_lines_in_a_json_file_and_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8-sig")
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_columns_that_share_a_name_with_ours(tmp_path):
    task = local_task("{text} / {target} / {fields}", ["no", "yes"])
    rows = [{"text": f"t{i}", "target": i, "fields": "f", "label": "yes"} for i in range(3)]
    split = load_split(task, write(tmp_path / "rows.jsonl", rows), labels="words")
    fields = {"text": "t2", "target": "2", "fields": "f"}
    assert split[2] == {"text": "t2 / 2 / f", "label": 1, "target": "yes", "fields": fields, "row": 3}


def test_load_split_keeps_every_row_in_order(tmp_path):
    rows = sst2_rows(0, 3) * 2
    split = load_split(SST2, write(tmp_path / "x.jsonl", rows))
    assert texts(split) == [f"sentence: {row['sentence']}" for row in rows]


def test_load_split_takes_columns_by_other_names_at_once(tmp_path):
    task = local_task("{a} / {b}", ["no", "yes"])
    path = write(tmp_path / "x.jsonl", [{"a": "first", "b": "second"}, {"a": "third", "b": "fourth", "liked": "yes"}])
    names = {"a": "b", "b": "a", "label": "liked"}
    split = load_split(task, path, labels="words", strict=False, names=names)
    assert split[:]["text"] == ["fourth / third"]  # of the first row there is no label
    with pytest.raises(ValueError, match="no column 'what'; columns found: 'a', 'b', 'liked'"):
        load_split(task, path, names={"label": "what"})


@pytest.fixture
def hub(monkeypatch):
    """Stands in for datasets.load_dataset, which gives the splits that a test puts into this dictionary."""
    splits = {}

    def load_dataset(path, config):
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


def test_hub_splits_of_mnli(hub):
    def rows(name):
        return [{"premise": f"{name} {i}", "hypothesis": "h", "label": i, "idx": i} for i in range(3)]

    hidden = [{**row, "label": -1} for row in rows("hidden")]
    named = {name: rows(name) for name in ("train", "validation_matched", "validation_mismatched")}
    hub |= {**named, "test_matched": hidden, "test_mismatched": hidden}
    data = load_task(get_task("glue/mnli"))
    assert texts(data.validation)[0] == "premise: validation_mismatched 0 hypothesis: h"
    assert texts(data.test)[0] == "premise: validation_matched 0 hypothesis: h"
    assert sizes(data) == [3, 3, 3]


def test_mnli_from_a_folder_with_either_names(tmp_path):
    rows = [{"premise": f"p {i}", "hypothesis": "h", "label": i % 3} for i in range(30)]
    mnli = get_task("glue/mnli")
    write_splits(tmp_path, train=rows[:10], validation=rows[10:20])
    assert (len(load_task(mnli, data_dir=tmp_path).validation)) == 5
    (tmp_path / "validation.jsonl").unlink()
    write_splits(tmp_path, validation_mismatched=rows[10:20], validation_matched=rows[20:])
    data = load_task(mnli, data_dir=tmp_path)
    assert texts(data.validation) == [f"premise: p {i} hypothesis: h" for i in range(10, 20)]
    assert texts(data.test) == [f"premise: p {i} hypothesis: h" for i in range(20, 30)]


@pytest.mark.parametrize("error", [ConnectionError("no route"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_hub_out_of_reach(monkeypatch, error):
    def unreachable(path, config):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"cannot load nyu-mll/glue \(rte\).*data_dir.*sentence1, sentence2, label"
    with pytest.raises(ConnectionError, match=message):
        load_task(RTE)


def test_hub_without_train(hub):
    hub["validation"] = sst2_rows(0, 4)
    with pytest.raises(FileNotFoundError, match="has no split 'train', only validation"):
        load_task(SST2)


def test_small_set_halves_validation_as_the_papers_do(tmp_path):
    validation = sst2_rows(100, 9)
    data = load_task(SST2, data_dir=write_splits(tmp_path, train=sst2_rows(0, 20), validation=validation))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(42)).tolist()
    expected = [f"sentence: {validation[i]['sentence']}" for i in order]
    assert texts(data.validation) == expected[:4]
    assert texts(data.test) == expected[4:]
    assert len(data.train) == 20


def test_large_set_takes_validation_from_train(tmp_path):
    train, validation = sst2_rows(0, 10_000), sst2_rows(10_000, 50)
    folder = write_splits(tmp_path, train=train, validation=validation)
    data = load_task(SST2, data_dir=folder)
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(42)).tolist()
    assert texts(data.validation) == [f"sentence: {train[i]['sentence']}" for i in order[:1000]]
    assert texts(data.test) == [f"sentence: {row['sentence']}" for row in validation]
    assert len(data.train) == 9000
    write(folder / "train.jsonl", train[:-1])
    data = load_task(SST2, data_dir=folder)
    assert sizes(data) == [9999, 25, 25]


def test_multirc_is_halved_whatever_its_size(tmp_path):
    rows = [{"paragraph": f"p{i}", "question": "q", "answer": "a", "label": i % 2} for i in range(10_010)]
    folder = write_splits(tmp_path, train=rows[:10_000], validation=rows[10_000:])
    data = load_task(get_task("super_glue/multirc"), data_dir=folder)
    assert sizes(data) == [10_000, 5, 5]


def test_missing_validation_is_a_tenth_of_train(tmp_path):
    folder = write_splits(tmp_path, train=sst2_rows(0, 40), test=sst2_rows(100, 3))
    data = load_task(SST2, data_dir=folder)
    assert sizes(data) == [36, 4, 3]
    assert set(texts(data.train)) | set(texts(data.validation)) == {f"sentence: film number {i}" for i in range(40)}
    assert texts(load_task(SST2, data_dir=folder, seed=1).validation) != texts(data.validation)


def test_single_file_split_by_hash(tmp_path):
    rows = sst2_rows(0, 200)
    rows += [{**row, "sentence": f" {row['sentence'].upper()}  "} for row in rows[:50]]  # the same texts once more
    data = load_task(SST2, train_file=write(tmp_path / "a.jsonl", rows))
    keys = [{text_key(text) for text in texts(split)} for split in (data.train, data.validation, data.test)]
    assert [len(k) for k in keys] == [160, 20, 20]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert len(data.train) + len(data.validation) + len(data.test) == 250

    random.Random(0).shuffle(rows)
    again = load_task(SST2, train_file=write(tmp_path / "b.csv", rows))
    for split in ("train", "validation", "test"):
        assert Counter(texts(getattr(again, split))) == Counter(texts(getattr(data, split)))
    other = load_task(SST2, train_file=tmp_path / "a.jsonl", seed=1)
    assert set(texts(other.test)) != set(texts(data.test))


def test_no_text_in_two_splits(tmp_path, caplog):
    shared = {
        "train": ("IN  validation", "in Test ", "Only in test", "cafe\u0301"),
        "validation": ("in validation", "in test"),
        "test": ("in test", "only in test", "caf\u00e9"),
    }
    own = {"train": sst2_rows(0, 20), "validation": sst2_rows(100, 5), "test": sst2_rows(200, 5)}
    rows = {split: own[split] + [{"sentence": text, "label": 1} for text in found] for split, found in shared.items()}
    folder = write_splits(tmp_path, **rows)
    with caplog.at_level(logging.WARNING, logger="ept.tasks.splits"):
        data = load_task(SST2, data_dir=folder)
    assert sizes(data) == [20, 6, 8]
    assert [record.getMessage() for record in caplog.records] == [
        "dropped 4 of 24 train rows: their text is also in validation or test",
        "dropped 1 of 7 validation rows: their text is also in test",
    ]


def test_nothing_left_for_train(tmp_path):
    rows = sst2_rows(0, 4)
    folder = write_splits(tmp_path, train=rows, validation=rows, test=sst2_rows(10, 2))
    with pytest.raises(ValueError, match=r"no rows are left for train \(train: 0, validation: 4, test: 2\)"):
        load_task(SST2, data_dir=folder)


def test_the_error_for_rows_of_one_text_names_the_columns_that_are_not_read(tmp_path):
    """As in MultiRC, where many questions are about one paragraph."""
    rows = [{"text": "one text", "question": f"why {i}", "label": i % 2} for i in range(40)]
    folder = write_splits(tmp_path, train=rows)
    message = "no rows are left for train .*: too few texts differ, and the model does not read 'question': name every"
    with pytest.raises(ValueError, match=f"{message} column to read with --text-column, or give more distinct texts"):
        load_task(local_task("{text}", ["0", "1"]), data_dir=folder)


def test_max_rows(tmp_path):
    folder = write_splits(tmp_path, train=sst2_rows(0, 50), validation=sst2_rows(50, 20), test=sst2_rows(70, 20))
    everything = load_task(SST2, data_dir=folder)
    limits = {"max_train": 10, "max_validation": 7, "max_test": 100}
    data = load_task(SST2, data_dir=folder, **limits)
    assert sizes(data) == [10, 7, 20]
    assert len(set(texts(data.train))) == 10
    assert set(texts(data.train)) <= set(texts(everything.train))
    assert texts(data.train) != texts(everything.train)[:10]
    assert texts(load_task(SST2, data_dir=folder, **limits).train) == texts(data.train)
    assert texts(load_task(SST2, data_dir=folder, **limits, seed=7).train) != texts(data.train)
    with pytest.raises(ValueError, match="max_test=0: give at least 1"):
        load_task(SST2, data_dir=folder, max_test=0)


def test_hidden_label_is_an_ordinary_one_where_the_task_has_it(tmp_path):
    task = local_task("{text}", {-1: "down", 1: "up"})
    rows = [{"text": f"t{i}", "label": -1} for i in range(9)]
    folder = write_splits(tmp_path, train=rows[:3], validation=rows[3:6], test=rows[6:])
    data = load_task(task, data_dir=folder, labels="words")
    assert texts(data.test) == ["t6", "t7", "t8"]
    assert set(data.test["target"]) == {"down"}


CLASSES = local_task("{text}", {0: "no", 1: "yes"})
ANSWERS = local_task("{text}", (), target_template="{answer}", metrics=["exact_match"])
RANGE = local_task("{text}", values=[0.0, 1.0, 2.0], metrics=["pearson"])


@pytest.mark.parametrize(
    "task, labels",
    [
        *((task, labels) for task in (CLASSES, ANSWERS, RANGE) for labels in (None, [None] * 4, [""] * 4)),
        *((task, labels) for task in (CLASSES, RANGE) for labels in ([-1] * 4, ["-1.0"] * 4, [-1, None, "", "-1"])),
    ],
)
def test_a_test_file_without_labels_is_as_none_and_said_to_be(tmp_path, caplog, task, labels):
    column = "answer" if task.is_text else "label"
    rows = [{"text": f"t{i}", column: i % 2} for i in range(20)]
    without = [{"text": f"u{i}"} | ({} if labels is None else {column: labels[i]}) for i in range(4)]
    folder = write_splits(tmp_path, train=rows[:12], validation=rows[12:], test=without)
    data = load_task(task, data_dir=folder, strict=False, labels="words")
    assert (data.sources["test"][0], len(data.test)) == ("validation", 4)
    assert "test.jsonl: no row has a label or an answer" in caplog.text


def test_rows_marked_as_unlabelled_are_left_out(tmp_path):
    rows = [{"text": f"t{i}", "label": [0, 1, -1, "-1"][i % 4]} for i in range(24)]
    data = load_task(CLASSES, data_dir=write_splits(tmp_path, train=rows), strict=False, labels="words")
    assert (sum(map(len, (data.train, data.validation, data.test))), data.left_out) == (12, {"no label": 12})


# task, labels of train and of test, score of the commonest train label
MAJORITIES = [
    (SST2, [1] * 4 + [0] * 6, [1, 1, 1, 0, 0], 2 / 5),
    # always 1: precision 1/2, recall 1, F1 2/3 for one class of three
    (CB, [2, 1, 1, 0], [0, 1, 1, 2], 2 / 9),
]


@pytest.mark.parametrize("task, train, test, score", MAJORITIES)
def test_majority(tmp_path, task, train, test, score):
    labels = {"train": train, "validation": [0], "test": test}
    rows = {
        split: [{**dict.fromkeys(task.columns, f"{split} {i}"), "label": label} for i, label in enumerate(found)]
        for split, found in labels.items()
    }
    assert load_task(task, data_dir=write_splits(tmp_path, **rows)).majority() == pytest.approx(score)


GOOD = '{"sentence": "fine", "label": 1}\n'
BAD_FILES = [
    ("t.jsonl", "", "the file is empty: it needs at least 1 row"),
    ("t.jsonl", "\n \n", "the file is empty"),
    ("t.json", "[]", "the file is empty"),
    ("t.csv", "", "the file is empty"),
    ("t.csv", "sentence,label\n", "the file is empty"),
    ("t.jsonl", GOOD + "\n{broken\n", r"t.jsonl, line 3: not JSON \(.* at column 2\)"),
    ("t.jsonl", GOOD + '{"sentence":\n', "t.jsonl, line 2: not JSON"),
    ("t.jsonl", GOOD + "[1, 2]\n", "t.jsonl, line 2: list, not an object"),
    ("t.json", "[{},\n", "t.json, line 2: not JSON"),
    ("t.json", "[1]", "t.json, row 1: int, not an object"),
    ("t.csv", "sentence,label\na,1\nb,c,0\n", "t.csv, line 3: the header has 2 columns, but this line has 3"),
    ("t.csv", "sentence,label\na\n", "t.csv, line 2: the header has 2 columns, but this line has 1"),
    ("t.csv", 'sentence,label\n"a,1\n', "t.csv, line 2: not CSV"),
    ("t.csv", "sentence,label,label\na,1,1\n", "the header sentence,label,label names a column twice"),
    ("t.parquet", "PAR1 nothing", "t.parquet: not a whole Parquet file"),
    ("t.jsonl", b'{"sentence": "\xff"}', "byte 0xff is not UTF-8"),
    ("t.xlsx", "sentence\tlabel\n", "unsupported suffix '.xlsx': use one of .jsonl, .json, .csv, .tsv, .parquet"),
    ("t.jsonl", None, "t.jsonl: no such file"),
    ("t.jsonl", '{"text": "a", "label": 1}\n', "row 1: no column 'sentence'; columns found: 'text', 'label"),
    ("t.jsonl", '{"sentence": "a", "y": 1}\n', "row 1: no column 'label'; columns found: 'sentence', 'y'"),
    ("t.jsonl", GOOD + '{"label": 1}\n', "row 2: no column 'sentence'"),
    ("t.jsonl", GOOD + '{"sentence": "a", "label": 2}\n', r"row 2: label 2 .* allowed are 0 \.\. 1"),
    ("t.jsonl", '{"sentence": "a", "label": "good"}\n', "row 1: label 'good' .* 'negative', 'positive'"),
    ("t.jsonl", '{"sentence": "a", "label": null}\n', "row 1: label None"),
    ("t.jsonl", '{"sentence": "a", "label": -1}\n', "row 1: label -1"),
    ("t.jsonl", '{"sentence": "a", "label": [1]}\n', r"row 1: label \[1\]"),
    ("t.jsonl", GOOD + '{"sentence": " \\n", "label": 1}\n', r"row 2: empty text \(column 'sentence'\)"),
    ("t.jsonl", '{"sentence": null, "label": 1}\n', "row 1: empty text"),
    ("t.jsonl", '{"sentence": ["a"], "label": 1}\n', "row 1: column 'sentence' holds a list, not text"),
    ("t.jsonl", GOOD * 9, "1 distinct texts cannot fill train, validation and test: give at least 3"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_bad_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=message):
        load_task(SST2, train_file=tmp_path / name)


# template, label words, the label of a row with the column `text`
BAD_ROWS = [
    ("{title}?", ["a", "b"], 1, r"no column 'title'; columns found: 'text', 'label'. The template '\{title\}\?'"),
    (
        "{text}",
        {"x": "a", "y": "b"},
        "z",
        r"row 1: label 'z' \(column 'label'\) is outside the set: allowed are 'x', 'y'",
    ),
]


@pytest.mark.parametrize("template, label_words, label, message", BAD_ROWS)
def test_bad_row_of_a_local_task(tmp_path, template, label_words, label, message):
    path = write(tmp_path / "t.jsonl", [{"text": "t", "label": label}])
    with pytest.raises(ValueError, match=message):
        load_task(local_task(template, label_words), train_file=path)


def test_one_blank_column_of_two_is_allowed(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"sentence1": "a", "sentence2": "", "label": 1}])
    assert texts(load_split(RTE, path)) == ["sentence1: a sentence2: "]


def test_test_file_with_some_labels_hidden(tmp_path):
    rows = [{**row, "label": -1 if i else 1} for i, row in enumerate(sst2_rows(50, 3))]
    folder = write_splits(tmp_path, train=sst2_rows(0, 9), test=rows)
    with pytest.raises(ValueError, match=r"test.jsonl, row 2: label -1"):
        load_task(SST2, data_dir=folder)


def test_bad_sources(tmp_path):
    path = write(tmp_path / "validation.jsonl", sst2_rows(0, 3))
    no_train = r"has no train split: it needs train\{.jsonl.* it holds validation.jsonl"
    cases = [
        ({"data_dir": tmp_path}, FileNotFoundError, no_train),
        ({"data_dir": tmp_path / "none"}, FileNotFoundError, "no such folder"),
        ({"data_dir": path}, FileNotFoundError, "no such folder"),
        ({"data_dir": tmp_path, "test_file": path}, ValueError, "test_file: give one or the other"),
        ({"validation_file": path}, ValueError, "validation_file without train_file"),
        ({"train_file": path, "labels": "letters"}, ValueError, "labels='letters': choose 'digits' or 'words'"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            load_task(SST2, **arguments)
    with pytest.raises(ValueError, match="the task is not on the hub: give data_dir or train_file"):
        load_task(local_task("{a}", ["no", "yes"]))
    write(tmp_path / "train.jsonl", sst2_rows(0, 3))
    write(tmp_path / "train.csv", sst2_rows(0, 3))
    with pytest.raises(ValueError, match=r"holds train.jsonl, train.csv: keep one file for each split"):
        load_task(SST2, data_dir=tmp_path)


REAL = Path(__file__).parents[2] / ".." / "shared" / "data"
# task, rows of train, validation and test after halving, majority
REAL_TASKS = [
    ("glue/sst2", 4000, 436, 436, None),
    ("glue/rte", 2490, 138, 139, None),
    ("glue/cola", 4000, 521, 522, 0.0),
    ("glue/mnli", 4000, 1000, 1000, None),
    ("glue/stsb", 4000, 749, 750, 0.0),
    ("super_glue/boolq", 4000, 1000, 1000, None),
    ("super_glue/cb", 250, 28, 28, None),
    ("super_glue/multirc", 3995, 991, 999, 0.0),  # the answers to a question stay together
    ("super_glue/wsc", 554, 50, 52, None),  # 2 validation texts are also in the test half
]


@pytest.mark.parametrize("name, train, validation, test, majority", REAL_TASKS)
def test_real_rows(name, train, validation, test, majority):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"no real rows of {name} beside this checkout ({folder.name} is not in ../shared/data)")
    task = get_task(name)
    data = load_task(task, data_dir=folder, labels="words")
    splits = (data.train, data.validation, data.test)
    assert tuple(map(len, splits)) == (train, validation, test)
    keys = [set(map(text_key, texts(split))) for split in splits]
    assert len(set.union(*keys)) == sum(map(len, keys))
    for split in splits if not task.values else ():
        assert set(split["label"]) == set(range(task.num_labels))
        assert list(split["target"]) == [task.label_words[label] for label in split["label"]]
        assert all(text.startswith(f"{task.columns[0]}: ") for text in texts(split))
    commonest = Counter(data.train["label"]).most_common(1)[0][0]
    share = Counter(data.test["label"])[commonest] / test
    if majority is not None:
        assert data.majority() == majority
    elif task.metrics[0] == "accuracy":
        assert data.majority() == pytest.approx(share)
    else:  # macro F1 of one class alone: its recall is 1, its precision the share
        assert data.majority() == pytest.approx(2 * share / (1 + share) / task.num_labels)
