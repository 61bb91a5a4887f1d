"""STS-B's rounding, MultiRC's groups, and few-shot drawing."""

import json
from collections import Counter

import numpy as np
import pytest

from ept.tasks import get_task, load_split, load_task, local_task, nearest_value
from ept.tasks.splits import few_shot

STSB, MULTIRC, CB = get_task("glue/stsb"), get_task("super_glue/multirc"), get_task("super_glue/cb")
GRID = STSB.values

# raw score, its text; T5 rounds to the nearest 0.2, ATTEMPT and DePT to the nearest 0.1 (2.333 -> 2.3)
ROUNDED = [
    (0, "0.0"), (5, "5.0"), ("3.8", "3.8"), (2.333, "2.4"), (2.25, "2.2"), (3.25, "3.2"), (1.6, "1.6"), (4.95, "5.0"),
    (3.799999952316284, "3.8"), (2.917, "3.0"), (0.09, "0.0"), (0.11, "0.2"),
]  # fmt: skip


@pytest.mark.parametrize("raw, text", ROUNDED)
def test_stsb_rounds_to_the_nearest_fifth(raw, text):
    assert STSB.label_words[STSB.label_class(raw)] == text


def test_stsb_rounds_as_t5_and_alike_in_single_precision():
    for hundredths in range(501):
        number = hundredths / 100
        wanted = float(np.round(np.float32(number) * np.float32(5)) / 5)
        assert GRID[nearest_value(number, GRID)] == pytest.approx(wanted, abs=1e-6), number
        assert nearest_value(float(np.float32(number)), GRID) == nearest_value(number, GRID), number


@pytest.mark.parametrize("raw", [-1, -0.5, 5.1, float("nan"), float("inf"), "", "five", None, True, [1]])
def test_no_score(raw):
    assert STSB.label_class(raw) is None


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_bad_score_names_the_range(tmp_path):
    write(tmp_path, "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 7.5}])
    with pytest.raises(ValueError, match=r"row 1: label 7\.5 .* allowed are numbers 0\.0 \.\. 5\.0"):
        load_task(STSB, data_dir=tmp_path)


def test_held_out_numbers_beyond_the_train_range_count_as_its_end(tmp_path, caplog):
    task = local_task("{text}", values=[0.0, 1.0, 2.0], metrics=["pearson"])
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate((0, -3, 2.5, 1e9, "inf"))]
    write(tmp_path, "train.jsonl", [{**row, "text": f"train {i}", "label": i % 3} for i, row in enumerate(rows)])
    for split in ("validation", "test"):
        write(tmp_path, f"{split}.jsonl", [{**row, "text": f"{split} {i}"} for i, row in enumerate(rows[:4])])
    data = load_task(task, data_dir=tmp_path, labels="words")
    assert data.validation["label"][:] == data.test["label"][:] == [0, 0, 2, 2]
    told = "test.jsonl: 3 of 4 rows have numbers beyond 0 .. 2 (such as 1e+09): a language model reads them as"
    assert told in caplog.text
    assert load_split(task, tmp_path / "test.jsonl", labels="words")["label"][:] == [0, 0, 2, 2]
    write(tmp_path, "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"test.jsonl, row 5: label 'inf' .* allowed are numbers 0\.0 \.\. 2\.0"):
        load_task(task, data_dir=tmp_path, labels="words")
    write(tmp_path, "train.jsonl", rows[:4])
    with pytest.raises(ValueError, match=r"train.jsonl, row 2: label -3"):
        load_task(task, data_dir=tmp_path, labels="words")


def scores(count, seed):
    drawn = np.random.default_rng(seed).uniform(0, 5, count).round(3).tolist()
    return [{"sentence1": f"{seed} a {i}", "sentence2": "b", "label": score} for i, score in enumerate(drawn)]


def test_stsb_balance_and_majority(tmp_path):
    write(tmp_path, "train.jsonl", [{**row, "label": 4.2} for row in scores(9, 0)] + scores(1, 3))
    write(tmp_path, "validation.jsonl", scores(10, 1))
    data = load_task(STSB, data_dir=tmp_path)
    assert list(data.balance()) == ["0 .. 1", "1 .. 2", "2 .. 3", "3 .. 4", "4 .. 5"]
    assert data.balance()["4 .. 5"] == pytest.approx(0.9)
    assert sum(data.balance().values()) == pytest.approx(1)
    assert data.majority() == 0.0  # a constant answer correlates with nothing


def multirc_rows(questions, prefix):
    return [
        {"paragraph": f"{prefix} text", "question": f"q{q}", "answer": f"a{a}", "label": a % 2}
        for q in range(questions)
        for a in range(2 + q % 3)
    ]


def test_answers_to_one_question_stay_together(tmp_path):
    write(tmp_path, "train.jsonl", multirc_rows(40, "train"))
    write(tmp_path, "validation.jsonl", multirc_rows(41, "validation"))
    data = load_task(MULTIRC, data_dir=tmp_path, max_train=30, max_validation=11, max_test=1)

    def questions(split):
        return {row["fields"]["question"] for row in split}

    assert not questions(data.validation) & questions(data.test)
    sizes = Counter(f"q{q}" for q in range(41) for _ in range(2 + q % 3))
    for split, limit in ((data.train, 30), (data.validation, 11), (data.test, 4)):
        assert 0 < len(split) <= limit
        assert len(split) == sum(sizes[question] for question in questions(split))
        groups = {(row["fields"]["question"], row["group"]) for row in split}
        assert len(groups) == len(questions(split)) == len(set(split["group"]))


def test_groups_stay_together_when_only_train_is_there(tmp_path):
    write(tmp_path, "train.jsonl", multirc_rows(30, "train"))
    data = load_task(MULTIRC, data_dir=tmp_path)
    seen = [{row["fields"]["question"] for row in split} for split in (data.train, data.validation, data.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 30


def labelled(labels):
    return [{"text": str(i), "label": label} for i, label in enumerate(labels)]


def test_few_shot_draws_as_many_of_each_label():
    rows = labelled([0] * 50 + [1] * 9 + [2] * 30)
    drawn = few_shot(CB, rows, 16, seed=0)
    assert Counter(row["label"] for row in drawn) == {0: 5, 1: 5, 2: 5}  # 16 // 3, as DePT's code
    assert drawn == few_shot(CB, rows, 16, seed=0)
    assert drawn != few_shot(CB, rows, 16, seed=1)
    assert drawn == [row for row in rows if row in drawn]


def test_few_shot_of_a_regression_draws_from_both_halves():
    rows = labelled([0] * 20 + [12] * 5 + [13] * 20 + [25] * 5)  # 0.0, 2.4 | 2.6, 5.0
    drawn = few_shot(STSB, rows, 16, seed=0)
    assert Counter(row["label"] > 12 for row in drawn) == {False: 8, True: 8}


@pytest.mark.parametrize(
    "k, message",
    [
        (2, "k_shot=2 is less than one row for each of 3 labels: give at least 3"),
        (12, "one label has 3: give at most k_shot=9"),
    ],
)
def test_few_shot_refused(k, message):
    with pytest.raises(ValueError, match=message):
        few_shot(CB, labelled([0, 1, 2] * 3), k, seed=0)


def test_few_shot_leaves_validation_and_test_alone(tmp_path):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 3} for i in range(60)]
    write(tmp_path, "train.jsonl", rows[:40])
    write(tmp_path, "validation.jsonl", rows[40:])
    whole, few = load_task(CB, data_dir=tmp_path), load_task(CB, data_dir=tmp_path, k_shot=6, shot_seed=3)
    assert len(few.train) == 6
    assert (list(few.validation), list(few.test)) == (list(whole.validation), list(whole.test))
