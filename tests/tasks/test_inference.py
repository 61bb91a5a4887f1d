"""Columns, labels, words and metrics inferred from rows, and what is refused."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest

from ept.tasks import local_task
from ept.tasks.inference import (
    default_template,
    find_columns,
    find_labels,
    find_texts,
    split_notes,
    unread_notes,
    unread_texts,
)

LONG = ("a rather long text", "another one of that length", "and so on")


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


# columns, what is given, text columns, label column
COLUMNS = [
    ({"text": LONG, "label": "aba"}, {}, ["text"], "label"),
    ({"Label": "aba", "Review Text": LONG}, {}, ["Review Text"], "Label"),
    ({"a": LONG, "b": "xyx"}, {}, ["a"], "b"),  # two columns: the shorter is the label
    ({"id": "123", "premise": LONG, "hypothesis": LONG, "gold": "aba"}, {}, ["premise", "hypothesis"], "gold"),
    ({"id": "123", "name": LONG, "spam": [True, False, True]}, {}, ["name"], "spam"),
    ({"score": "121", "text": LONG, "sentiment": "aba"}, {}, ["text"], "sentiment"),
    ({"title": ["x", "y", "z"], "story": LONG, "kind": "aba", "the_sentiment": "bab"}, {}, ["story"], "the_sentiment"),
    ({"text": LONG, "label": "aba", "other": "xyx"}, {"label_column": "other"}, ["text"], "other"),
    ({"text": LONG, "title": LONG, "label": "aba"}, {"text_columns": ["title", "text"]}, ["title", "text"], "label"),
    ({"text": ["", None, "fine"], "label": "aba"}, {}, ["text"], "label"),
    ({"claim": ["a", "b", "c"], "evidence": LONG, "label": "aba"}, {}, ["claim", "evidence"], "label"),
    ({"ID": "123", "Tweet": LONG, "Target": "aab", "Stance": "aba"}, {}, ["Tweet"], "Stance"),
    ({"tweet": LONG, "target": "aba"}, {}, ["tweet"], "target"),
    ({"task": LONG, "more": [None, "", "x" * 30], "label": "aba"}, {}, ["task"], "label"),  # seldom there
    ({"sentence_A": LONG, "id": "123", "sentence_B": LONG, "label": "aba"}, {}, ["sentence_A", "sentence_B"], "label"),
    ({"uid": ["e3e70682-c209-4cac"] * 3, "ask": ["pay", "book it", "go"], "intent": "aba"}, {}, ["ask"], "intent"),
    ({"link": ["https://a.b/c-d-e-f-g/h"] * 3, "title": [*"xyz"], "topic": "aba"}, {}, ["title"], "topic"),
    ({"file": ["b/0001.txt", "b/0002.txt", "c.txt/"], "label": "aba"}, {}, ["file"], "label"),  # the only one
    ({"headline1": LONG, "headline2": LONG, "data": "xyz", "label": "aba"}, {}, ["headline1", "headline2"], "label"),
    ({"left_text": LONG, "right_text": LONG, "same": "101"}, {}, ["left_text", "right_text"], "same"),
    ({"Text one": LONG, "Text Two": LONG, "same": "101"}, {}, ["Text one", "Text Two"], "same"),
    ({"copyright": LONG, "copyleft": ["x" * 9] * 3, "same": "101"}, {}, ["copyright"], "same"),
    ({"Class Index": "121", "Title": [*"xyz"], "Description": LONG}, {}, ["Title", "Description"], "Class Index"),
    ({"Class Index": "121", "Description": LONG}, {}, ["Description"], "Class Index"),
    ({"category": "aaa", "review": LONG, "verdict": "aba"}, {}, ["review"], "verdict"),  # one label alone is none
    ({"category": "aba", "review": LONG, "label": "bab"}, {}, ["review"], "label"),
    ({"Target": "aab", "text": LONG, "Stance": "aba", "score": "121"}, {}, ["text"], "Stance"),
    ({"text": LONG, "comment": ["fine", None, None], "topic": "aba"}, {}, ["text"], "topic"),
    ({"question": LONG, "comment": ["fine", None, None], "topic": "aba"}, {}, ["question"], "topic"),  # seldom there
    ({"question": ["a", "b", "c"], "answer": LONG, "label": "aba"}, {}, ["question", "answer"], "label"),
    ({"Title": [*"abc"], "Description": LONG, "class": "aba"}, {}, ["Title", "Description"], "class"),
    ({"sentence_A": LONG, "sentence_B": LONG, "some_score": "121"}, {}, ["sentence_A", "sentence_B"], "some_score"),
    ({"line": LONG, "idx": [{"row": 10**9, "part": 10**9}] * 3, "label": "aba"}, {}, ["line"], "label"),
]  # fmt: skip


@pytest.mark.parametrize("columns, given, texts, label", COLUMNS)
def test_columns(columns: dict[str, Any], given: dict[str, Any], texts: list[str], label: str) -> None:
    assert find_columns(rows(**columns), "a.csv", **given) == (texts, label)


def test_texts_of_instructions() -> None:
    made = rows(instruction=["do", "write", "say"], input=["", *LONG[:2]], id="123")
    assert find_texts(made, "a.json") == ["instruction", "input"]


NO_COLUMNS = [
    ({"text": LONG, "a": "xyx", "b": "yxx"}, {}, "a.csv: 'a', 'b' could each be the label: .* --label-column"),
    ({"text": LONG, "other": LONG, "third": LONG}, {}, "none of 'text', 'other', 'third' looks .*--target-template"),
    (
        {"question": LONG, "choices": [{"text": [*LONG], "label": [*"ABC"]}] * 3, "label": "ABC"},
        {},
        "'choices', the longest, holds a dict, not text: flatten it to a string, or name the columns to read",
    ),
    ({"category": "aba", "review": LONG, "sentiment": "bab"}, {}, "'category', 'sentiment' could each be the label"),
    (
        {"Tweet": LONG, "Target": "aab", "Stance": "aba", "Opinion": "abb", "Sentiment": "bab"},
        {},
        "'Sentiment', 'Stance' could each be the label",
    ),
    ({"sentence_A": LONG, "sentence_B": LONG, "a_score": "121", "verdicts": "aba"}, {}, "'a_score', 'verdicts' could"),
    ({"id": ["1000", "1001", "1002"], "text": LONG}, {}, "none of 'id', 'text' looks like the label"),
    ({"text": LONG, "user_id": "121"}, {}, "none of 'text', 'user_id' looks like the label"),
    (
        {"title": "aab", "context": LONG, "question": LONG, "answers": [{"text": ["a"]}] * 3},
        {},
        "none of 'title', 'context', 'question', 'answers' looks like the label: .*--target-template",
    ),
    (
        {"idx": "123", "passage": [{"text": "a", "questions": [{"question": "b", "answers": [{"label": 1}]}]}] * 3},
        {},
        "'passage' looks like the label: .*; labels inside 'passage' need columns of their own, one row per label",
    ),
    ({"n": "123", "label": "aba"}, {}, "a.csv: none of 'n' holds text: name it with --text-column"),
    ({"text": LONG, "label": "aba"}, {"label_column": "lable"}, "no column 'lable'; columns found: 'text', 'label'"),
    ({"text": LONG, "label": "aba"}, {"text_columns": ["text", "text"]}, "column 'text' is named twice: name each"),
    ({"text": LONG, "label": "aba"}, {"text_columns": ["review"]}, "no column 'review'; columns found: 'text', "),
]  # fmt: skip


@pytest.mark.parametrize("columns, given, message", NO_COLUMNS)
def test_columns_that_cannot_be_told(columns: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(rows(**columns), "a.csv", **given)


# labels, label words, metrics
ACCURACY = ["accuracy"]
LABELS = [
    (["b", "a", " a ", "b"], {"a": "a", "b": "b"}, ACCURACY),
    (["0", "1", "1", "0"], {"0": "0", "1": "1"}, ACCURACY),
    ([2, 10, 10, 2], {2: "2", 10: "10"}, ACCURACY),
    ([1.0, 2.0, None, float("nan")], {1: "1", 2: "2"}, ACCURACY),
    (["1.0", "2.0", "1", "2", ""], {"1": "1", "1.0": "1", "2": "2", "2.0": "2"}, ACCURACY),
    (["0101", "202", "0303", "202"], {"0101": "0101", "202": "202", "0303": "0303"}, ACCURACY),
    (["01", "1", "2", "1"], {"01": "01", "1": "1", "2": "2"}, ACCURACY),
    ([2**60 + 1, 2**60, 2**60 + 1], {2**60: str(2**60), 2**60 + 1: str(2**60 + 1)}, ["accuracy", "f1_macro"]),
    ([f"{i:02}" for i in range(24)] * 2, {f"{i:02}": f"{i:02}" for i in range(24)}, ACCURACY),
    (["0%", "50%", "100%", "0%"], {"0%": "0%", "100%": "100%", "50%": "50%"}, ACCURACY),
    ([*"0123456789", "?"] * 2, {**{digit: digit for digit in "0123456789"}, "?": "?"}, ACCURACY),
    ([True, False, False, True], ["false", "true"], ACCURACY),
    (["TRUE", "False", "FALSE", "true"], ["false", "true"], ACCURACY),
    ([True, False, "Maybe"], {"Maybe": "Maybe", False: "false", True: "true"}, ACCURACY),
    ([True, "a", 0], {0: "0", "a": "a", True: "true"}, ACCURACY),
    (["yes", "no", "no", "no"], {"no": "no", "yes": "yes"}, ["accuracy", "f1_macro"]),
    (["1", "one", "1", "one"], {"1": "1", "one": "one"}, ACCURACY),
    (["日本", "🎉", "日本", "🎉"], {"日本": "日本", "🎉": "🎉"}, ACCURACY),
]


@pytest.mark.parametrize("labels, words, metrics", LABELS)
def test_labels(labels: list[Any], words: Any, metrics: list[str]) -> None:
    found = find_labels([{"label": label} for label in labels], "label", "a.csv")
    assert (found.words, found.values, found.metrics) == (words, None, metrics)
    task = local_task("{text}", found.words or [])
    classes = [task.label_class(label) for label in labels]
    assert {index for index in classes if index is not None} == set(range(task.num_labels))
    assert [label for label, index in zip(labels, classes) if index is None] == [
        label for label in labels if label is None or label == "" or label != label
    ]


@pytest.mark.parametrize("train, others", [
    (["0.0", "1.0"], [0, 1, 1.0, "1", "1.0", "1.", True]),
    (["0", "1"], [0, 1, 1.0, "1", "1.0", "1.00"]),
    ([0, 1], ["0.0", "1", "1.0"]),
    ([Decimal("0.00"), Decimal("1.00")], [0, "1", Decimal(1)]),
    ([False, True], ["0.0", "1.0"]),
])  # fmt: skip
def test_a_number_is_one_label_however_files_write_it(train: list[Any], others: list[Any]) -> None:
    task = local_task("{text}", find_labels([{"label": label} for label in train], "label", "a.csv").words or [])
    assert [task.label_class(label) for label in others] == [int(float(label)) for label in others]
    assert [task.label_class(label) for label in ("01", "1.5", "-1.0", "1e0")] == [None] * 4


# labels, first and last value and their number
REGRESSIONS = [
    ([0.0, 2.5, 5.0, 3.3], 0.0, 5.0, 26),
    (["1.5", "2.25", "3"], 1.5, 3.0, 16),
    (list(range(100)), 0.0, 100.0, 21),
    ([-0.013, 0.0471], -0.015, 0.05, 14),
    ([1e-6, 2.5e-6, 6e-6], 1e-6, 6e-6, 26),
    ([n / 2 for n in range(1, 11)], 0.5, 5.0, 10),  # their own grid
    ([0.1, 0.2, 0.3, 0.6, 0.7], 0.1, 0.7, 7),
    ([0.5, 1.0, 1.5, 2.0, 50.0], 0.0, 50.0, 26),  # of which they would fill little
]


@pytest.mark.parametrize("labels, first, last, count", REGRESSIONS)
def test_numbers_make_a_regression(labels: list[Any], first: float, last: float, count: int) -> None:
    found = find_labels([{"label": label} for label in labels], "label", "a.csv")
    assert found.words is None
    assert found.values is not None
    assert (found.values[0], found.values[-1], len(found.values)) == (first, last, count)
    task = local_task("{text}", values=found.values, metrics=found.metrics)
    step = found.values[1] - found.values[0]
    for label in labels:
        assert abs(task.values[task.label_class(label) or 0] - float(label)) <= step / 2 + 1e-9


@pytest.mark.parametrize("numbers, warns", [
    ([*range(60), 10_000], True),
    ([-x for x in (*range(60), 10_000)], True),
    ([0] * 60 + [1, 2, 10_000.5], False),  # what is lost is little
    (list(range(60)), False),
])  # fmt: skip
def test_a_regression_whose_numbers_nearly_all_round_to_one(numbers: list[float], warns: bool) -> None:
    notes = find_labels([{"label": number} for number in numbers], "label", "a.csv").notes
    assert bool(notes) == warns
    assert all(note.startswith("60 of 61 rows, with 60 different numbers, are rounded to 0, because") for note in notes)


@pytest.mark.parametrize("numbers, warns", [
    (2 * list(range(30)), True),
    (2 * [str(n) for n in range(1, 40)], True),
    (2 * [n for n in range(30) if n != 7], False),
    (2 * list(range(5, 40)), False),
    ([*range(30), 0], False),
    (3 * [n for n in range(30) if n != 7], True),  # which come often, in a column of labels
    (3 * list(range(5, 40)), True),
    (3 * [n / 2 for n in range(30)], False),
    (2 * [n / 2 for n in range(30)], False),
])  # fmt: skip
def test_many_whole_numbers_may_be_classes(numbers: list[Any], warns: bool) -> None:
    rows = [{"label": number} for number in numbers]
    found = find_labels(rows, "label", "a.csv", in_words=False)
    assert found.values is not None
    assert [note.endswith("if they are classes, set data.kind=classification") for note in found.notes] == [
        True
    ] * warns
    if warns:
        classes = find_labels(rows, "label", "a.csv", kind="classification")
        assert list(dict.fromkeys((classes.words or {}).values())) == [str(n) for n in sorted(set(map(int, numbers)))]


def test_few_whole_numbers_may_be_a_regression() -> None:
    found = find_labels([{"label": n % 5} for n in range(40)], "label", "a.csv", kind="regression")
    assert (found.words, found.metrics[0]) == (None, "pearson")
    assert found.values is not None
    assert (found.values[0], found.values[-1]) == (0, 4)
    with pytest.raises(ValueError, match=r"holds 'good', 'inf': a regression needs numbers, leave data.kind out"):
        find_labels([{"label": label} for label in ("1", "good", "inf")], "label", "a.csv", kind="regression")


NO_LABELS = [
    (["good"] * 5, "column 'label' holds only one label, 'good': a task needs at least 2"),
    (["good", " good"], "holds only one label"),
    ([1.5, 1.5], "holds only one label, '1.5'"),
    (
        [*(i / 2 for i in range(60)), "inf", "?"],
        r"column 'label' holds numbers, except for 'inf', '\?': correct these cells or leave them empty, or list all",
    ),
    ([*map(str, range(30)), "n/a"], "holds numbers, except for 'n/a'"),
    ([*range(30), float("inf")], "holds numbers, except for inf"),
    (
        ["1,5", "2,0", "2.5"] * 9,
        "holds numbers that are written as '1,5', '2,0': write them like 1234.5, with no comma",
    ),
    ([f"{i}%" for i in range(30)], "holds numbers that are written as '0%', '1%', .* and 22 more: write them"),
    ([f"1.{i},5" for i in range(100, 130)], "holds numbers that are written as '1.100,5'"),
    ([f"1,{i}.50 %" for i in range(100, 130)], "holds numbers that are written as '1,100.50 %'"),
    (["", None], "column 'label' is empty"),
    (
        ["Good", "good", "bad", "good", "Bad"],
        r"labels 'Good' \(1 rows\) and 'good' \(2 rows\) differ only in case, blanks or invisible characters: "
        r"write 'good' for all.*"
        r"data.label_words=\{'Good': 'good', 'good': 'good', 'bad': 'bad', 'Bad': 'bad'\}",
    ),
    ([["good"], ["bad"]], "a.csv: column 'label' holds a list, not one label per row"),
    (["good", "['bad', 'good']"], "holds \"\\['bad', 'good'\\]\", a list, not one label per row"),
    (["['good']", "['bad']"], "holds \"\\['good'\\]\", a list, not one label per row"),
    (["❤", "❤\ufe0f", "🎉"], "differ only in case, blanks or invisible characters"),
    *(
        (["café", other, "no"], "differ only in case, blanks or invisible characters")
        for other in ("cafe\u0301", "café\u200b")
    ),
    (["very  good", "very good"], "differ only in case, blanks or invisible characters"),
    ([f"answer {n}" for n in range(9)], "holds 9 different values in 9 rows, too many for labels"),
]


@pytest.mark.parametrize("labels, message", NO_LABELS)
def test_labels_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_labels([{"label": label} for label in labels], "label", "a.csv")


def test_a_file_without_a_header_is_refused() -> None:
    made = [{"the film was very good": f"film {n}", "good": ("good", "bad")[n % 2]} for n in range(6)]
    with pytest.raises(ValueError, match="the first line holds a row, not names: put a line such as text,label"):
        find_columns(made, "a.csv")


@pytest.mark.parametrize("names, labels, is_row", [
    (("old storm 0", "0"), "01", True),
    (("storm0", "female"), ("female", "male"), True),
    (("message", "spam"), ("spam", "ham"), False),  # whose names are usual ones
    (("ask", "spam"), ("yes", "no"), False),
])  # fmt: skip
def test_a_first_row_of_short_texts_is_no_header(names: tuple[str, str], labels: Any, is_row: bool) -> None:
    text, label = names
    made = [{text: f"storm{n}", label: labels[n % 2]} for n in range(6)]
    if is_row:
        with pytest.raises(ValueError, match="the first line holds a row, not names: put a line such as text,label"):
            find_columns(made, "a.csv")
        assert find_columns(made, "a.csv", label_column=label) == ([text], label)
    else:
        assert find_columns(made, "a.csv") == ([text], label)


# columns beside the answer, which are read, what is not
SOURCES = [
    ({"prompt": ["a b", "b", "c"], "rejected": LONG}, ["prompt"], "'rejected'"),
    ({"problem": ["a b", "b", "c"], "level": "aba", "type": "bba", "solution": LONG}, ["problem"], "'solution'"),
    ({"question": [*"abc"], "options": [["a", "b"]] * 3, "rationale": LONG}, ["question"], "'options', 'rationale'"),
    ({"instruction": [*"abc"], "context": ["", "", "long " * 9], "category": "aba"}, ["instruction", "context"], ""),
    ({"en": [*"abc"], "fr": LONG}, ["fr"], "'en'"),
    ({"id": "123", "source": ["web", "web", "tv"], "text": LONG}, ["text"], ""),
    ({"source": LONG, "url": ["https://a.b/c"] * 3}, ["source"], ""),
    ({"rationale": LONG}, ["rationale"], ""),  # where there is nothing else
    ({"document": LONG, "id": "123"}, ["document"], ""),
]


@pytest.mark.parametrize("columns, texts, unread", SOURCES)
def test_what_an_answer_is_written_to(columns: dict[str, Any], texts: list[str], unread: str) -> None:
    made = rows(**columns)
    assert find_texts(made, "a.csv") == texts
    notes = unread_texts(made, texts)
    assert [f"is read, not {unread}: if the answer depends" in note for note in notes] == [True] * bool(unread)


@pytest.mark.parametrize("column, values, said", [
    ("split", ["train", "test", "train"], True),
    ("Fold", ["Train", "Dev", "Validation"], True),
    ("split", ["a", "b", "a"], False),
    ("kind", ["train", "test", "train"], False),
])  # fmt: skip
def test_a_column_that_says_which_rows_are_held_out(column: str, values: list[str], said: bool) -> None:
    notes = split_notes(rows(text=LONG, **{column: values}))
    assert [note.startswith(f"column '{column}' does not decide") for note in notes] == [True] * said


# columns beside the label, labels, what is said about those that are not read
UNREAD = [
    ({"premise": LONG, "choice1": [*"abc"], "choice2": [*"bcd"]}, [0, 1, 0], "choices in 'choice1', 'choice2', which"),
    ({"article": LONG, "options": [["a", "b"]] * 3}, [*"ABA"], "labels 'A', 'B' may be .* choices in 'options', which"),
    ({"question": LONG, "A": [*"123"], "B": [*"234"]}, [*"ABA"], "choices in 'A', 'B', which the model does not read"),
    (
        {"passage": LONG[:1] * 3, "answer": [*"abc"], "n": [1, 2, 3]},
        [0, 1, 0],
        "3 of 3 rows have .* and 'answer', which",
    ),
    (
        {"goal": [*"abc"], "sol1": LONG, "sol2": LONG},
        [0, 1, 0],
        "labels '0', '1' may be .* of 'sol1', 'sol2' as answers to 'goal', which the model does not read",
    ),
    (
        {"sentence": ["Good food.", "The Waiters frown", "good for drinks"], "aspect": ["food", "waiter", "drinks"]},
        ["good", "bad", "good"],
        "labels may be about 'aspect', which the model does not read: nearly every row has part of its text there",
    ),
    ({"sentence1": ["A gap", "gaps", "no go"], "sentence2": LONG, "word": ["gap", "gap", "go"]}, [0, 1, 0], "'word'"),
    ({"text": ["A gap", "gaps", "no go"], "word": ["gap", "gap", "go"]}, [0.5, 1.2, 3.0], "labels may be about 'word'"),
    ({"sol1": LONG, "sol2": LONG, "goal": [*"abc"]}, [0.5, 1.2, 3.0], None),
    ({"text": ["Good food", "bad food", "ok"], "lower": ["good food", "bad food", "ok"]}, ["a", "b", "a"], None),
    ({"text": LONG, "lang": ["en", "en", "de"], "source": ["web"] * 3}, ["good", "bad", "good"], None),
    ({"id": ["a-1", "a-2", "a-3"], "sentence1": LONG, "sentence2": LONG, "topic": [*"abc"]}, [0, 1, 0], None),
    ({"id": ["a-1", "a-2", "a-3"], "sol1": LONG, "sol2": LONG}, [0, 1, 0], None),
    ({"text": LONG, "title": [*"abc"], "n1": [1, 2, 3], "n2": [1, 2, 3]}, [0, 1, 0], None),
    ({"text": LONG, "choice1": [*"abc"], "choice2": [*"bcd"]}, ["good", "bad", "good"], None),
    ({"premise": LONG, "hypothesis": LONG, "marks": [["a"]] * 3}, [0, 1, 0], None),
]


@pytest.mark.parametrize("columns, labels, said", UNREAD)
def test_columns_that_the_label_may_be_about(columns: dict[str, Any], labels: list[Any], said: str | None) -> None:
    made = rows(**columns, label=labels)
    texts, label = find_columns(made, "a.csv")
    words = sorted({*map(str, labels)}) if not isinstance(labels[0], float) else []
    notes = unread_notes(made, texts, label, words)
    assert [bool(re.search(said or "", note)) for note in notes] == [True] * (said is not None)


def test_notes() -> None:
    labels = ["good"] * 9 + ["bad"] * 9 + ["nan"] * 3
    notes = find_labels([{"label": label} for label in labels], "label", "a.csv").notes
    assert notes == [
        "labels with fewer than 5 rows, which may be missing in a split: 'nan' (3)",
        "a label that reads like a missing one: 'nan'; if it means that, leave its cells empty",
    ]


def test_labels_that_look_like_several() -> None:
    labels = ["Drama", "Drama|Comedy", "Comedy", "black and white", "yes/no"] * 5
    notes = find_labels([{"label": label} for label in labels], "label", "a.csv").notes
    said = "labels that look like several at once: 'Drama|Comedy'; each is learned and scored as one label"
    assert [note[: len(said)] for note in notes] == [said]


@pytest.mark.parametrize("column, warns", [("intent", True), ("Class Index", True), ("sic code", True), ("age", False)])
def test_numbered_classes_of_which_some_are_missing(column: str, warns: bool) -> None:
    notes = find_labels([{column: n} for n in range(0, 150, 5)] * 2, column, "a.csv", in_words=False).notes
    assert [note.endswith("if they are classes, set data.kind=classification") for note in notes] == [True] * warns


@pytest.mark.parametrize("columns, label, asks, template", [
    (["text"], "label", False, "{text}"),
    (["text"], "mood {1}", True, "{text}\nmood {{1}}:"),
    (["a", "b c"], "label", True, "a: {a} b c: {b c}\nlabel:"),
])  # fmt: skip
def test_template(columns: list[str], label: str, asks: bool, template: str) -> None:
    assert default_template(columns, label, asks) == template
    assert local_task(template, ["no", "yes"]).columns == tuple(columns)


@pytest.mark.parametrize("column", ["a.b", "a[0]", "1", "a:b", " "])
def test_a_column_that_cannot_stand_in_a_template(column: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a template: rename it to a plain word"):
        default_template([column], "label", False)


@pytest.mark.parametrize(
    "raws, words",
    [
        ([0, 1, 2, -1], ["0", "1", "2"]),
        (["0", "1", "2", "-1"], ["0", "1", "2"]),
        ([0, 1, -1], ["-1", "0", "1"]),  # a sentiment's
        ([1, 2, 3, -1], ["-1", "1", "2", "3"]),
        (["a", "b", "c", "-1"], ["-1", "a", "b", "c"]),
    ],
)
def test_minus_one_beside_classes_that_are_counted_from_zero_is_no_label(raws: list[Any], words: list[str]) -> None:
    found = find_labels([{"label": raw} for raw in raws * 6], "label", "rows")
    assert list(found.words.values() if isinstance(found.words, dict) else found.words or ()) == words
    assert any("6 rows have the label -1 beside 0 .. 2" in note for note in found.notes) == ("-1" not in words)
