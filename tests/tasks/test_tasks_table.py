"""The table of tasks, get_task, local_task and how raw labels are read."""

from datetime import date, datetime
from decimal import Decimal

import pytest

from ept.tasks import TASKS, get_task, local_task, render

# name, configuration on the hub, columns, words (of a regression None), metrics, max_length
TABLE = [
    ("glue/cola", "cola", "sentence", "unacceptable acceptable", "matthews_correlation", 256),
    ("glue/mnli", "mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy", 256),
    ("glue/mrpc", "mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", 256),
    ("glue/qnli", "qnli", "question sentence", "entailment not_entailment", "accuracy", 256),
    ("glue/qqp", "qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", 256),
    ("glue/rte", "rte", "sentence1 sentence2", "entailment not_entailment", "accuracy", 256),
    ("glue/sst2", "sst2", "sentence", "negative positive", "accuracy", 256),
    ("glue/stsb", "stsb", "sentence1 sentence2", None, "pearson spearman", 256),
    ("super_glue/boolq", "boolq", "question passage", "False True", "accuracy", 256),
    ("super_glue/cb", "cb", "premise hypothesis", "entailment contradiction neutral", "f1_macro accuracy", 256),
    ("super_glue/multirc", "multirc", "question answer paragraph", "False True", "f1 exact_match accuracy", 348),
    ("super_glue/wic", "wic", "sentence1 sentence2 word", "False True", "accuracy", 256),
    ("super_glue/wsc", "wsc.fixed", "text", "False True", "accuracy", 256),
]


def test_table_is_complete():
    assert sorted(TASKS) == sorted(name for name, *_ in TABLE)
    assert len(TASKS) == 13


@pytest.mark.parametrize("name, config, columns, words, metrics, max_length", TABLE)
def test_task(name, config, columns, words, metrics, max_length):
    task = get_task(name)
    assert task.name == name
    assert task.hub == ({"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}[name.split("/")[0]], config)
    assert task.columns == tuple(columns.split())
    if words is None:  # a regression: the numbers themselves
        assert task.label_words == task.label_digits == tuple(f"{i / 5:.1f}" for i in range(26))
        assert task.num_outputs == 1
    else:
        assert task.label_words == tuple(words.split())
        assert task.label_digits == tuple("012"[: len(task.label_words)])
        assert task.num_outputs == len(task.label_words)
    assert task.metrics == tuple(metrics.split())
    assert task.max_length == max_length


# WSC: text, index and text of the noun, index and text of the pronoun, the text with marks
SPANS = [
    ("Ann told  Bo, she won.", 0, "Ann", 3, "she", "* Ann * told  Bo, # she # won."),
    # the pronoun before the noun; several words; punctuation right behind
    ("She won, the old Ann.", 2, "the old Ann", 0, "she", "# She # won, * the old Ann *."),
    # an index that is off by one, with the same word farther away; "it" is not in "item"
    ("it item use it now", 1, "item", 2, "it", "it * item * use # it # now"),
]


@pytest.mark.parametrize("text, noun_index, noun, pronoun_index, pronoun, marked", SPANS)
def test_wsc_marks_its_spans(text, noun_index, noun, pronoun_index, pronoun, marked):
    spans = {"span1_index": noun_index, "span1_text": noun, "span2_index": pronoun_index, "span2_text": pronoun}
    assert render(get_task("super_glue/wsc"), {"text": text, **spans}) == f"text: {marked}"


def test_wsc_span_that_is_not_there():
    row = {"text": "Ann won.", "span1_index": 0, "span1_text": "Bo", "span2_index": 1, "span2_text": "won"}
    with pytest.raises(ValueError, match="span 'Bo' does not occur in the text 'Ann"):
        render(get_task("super_glue/wsc"), row)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("text", None, "span 'Ann' does not occur in the text ''"),
        ("text", ["Ann"], "column 'text' holds a list, not text"),
        ("span1_text", None, "span '' does not occur"),
        ("span1_index", None, "column 'span1_index' holds None: give the number of words"),
        ("span2_index", "one", "column 'span2_index' holds 'one': give the number of words"),
    ],
)
def test_a_wsc_row_with_a_damaged_cell_is_refused_by_its_column(column, value, message):
    row = {"text": "Ann won.", "span1_index": "0", "span1_text": "Ann", "span2_index": 1, "span2_text": "won"}
    assert render(get_task("super_glue/wsc"), row) == "text: * Ann * # won #."
    with pytest.raises(ValueError, match=message):
        render(get_task("super_glue/wsc"), {**row, column: value})


@pytest.mark.parametrize("values", [[0, float("nan"), 1], [0, float("inf")], [0, 1, 3], [1, 0], [1]], ids=str)
def test_values_that_are_no_even_grid_of_numbers_are_refused(values):
    with pytest.raises(ValueError, match="give at least 2 numbers, evenly spaced and rising"):
        local_task("{text}", values=values)


NEAREST = {
    **{"glue/sst-2": "glue/sst2", "sst2": "glue/sst2", "RTE": "glue/rte"},
    **{"superglue-boolq": "super_glue/boolq", "super_glue/wsc.fixed": "super_glue/wsc"},
}


@pytest.mark.parametrize("name, nearest", NEAREST.items())
def test_unknown_task(name, nearest):
    with pytest.raises(ValueError, match=f"unknown task '{name}': did you mean '{nearest}'.*`ept tasks`"):
        get_task(name)


# label_words, (raw label, class) pairs, raw labels that are none
LABELS = [
    (["no", "yes"], [(0, 0), ("1", 1), (1.0, 1), (True, 1), (False, 0), ("true", 1), (" yes ", 1)], [2, -1, "maybe"]),
    (["low", "mid", "high"], [(2, 2), ("2", 2), ("mid", 1)], [3, 0.5, None, "", "LOW", [0]]),
    ({0: "no", 1: "yes"}, [(0, 0), ("1", 1), (True, 1)], ["yes", 2]),
    ({1: "no", 0: "yes"}, [(1, 0), ("0", 1), (True, 0)], ["no"]),
    ({"pos": "good", "neg": "bad"}, [("pos", 0), ("neg", 1)], ["good", 0, 1, True]),
    ({True: "fun", False: "dry"}, [(True, 0), (False, 1), (1, 0), ("0", 1), ("True", 0), ("false", 1)], ["fun"]),
    ({-1: "down", 1: "up"}, [(-1, 0), ("-1", 0), (-1.0, 0), ("-1.0", 0), (1, 1)], [0, "-1.5"]),
    ({1: "bad", 2: "bad", 3: "good"}, [(1, 0), (2, 0), (3, 1), ("3", 1)], [0, 4]),
    (
        ["2024-01-01", "2024-01-02"],
        [(date(2024, 1, 2), 1), ("2024-01-01", 0)],
        [datetime(2024, 1, 1)],
    ),
    ({"0": "no", "1.5": "yes"}, [(Decimal("1.5"), 1), (Decimal(0), 0)], [Decimal(2)]),
    ({"True": "a", True: "b"}, [("True", 0), (True, 1)], [0]),
    (["False", "Maybe", "True"], [(True, 2), ("true", 2), (False, 0), (1, 1), ("TRUE", 2)], []),
    (["True", "False"], [(True, 0), (False, 1), ("FALSE", 1), (1, 1)], []),
]


@pytest.mark.parametrize("label_words, classes, strangers", LABELS)
def test_raw_labels(label_words, classes, strangers):
    task = local_task("{text}", label_words)
    assert [(raw, task.label_class(raw)) for raw, _ in classes] == classes
    assert [(raw, task.label_class(raw)) for raw in strangers] == [(raw, None) for raw in strangers]


def test_named_task_reads_booleans_digits_and_words():
    task = get_task("super_glue/boolq")
    assert [task.label_class(raw) for raw in (False, True, 0, "1", "False", "true")] == [0, 1, 0, 1, 0, 1]
    assert task.labels("digits") == ("0", "1")
    assert task.labels("words") == ("False", "True")
    with pytest.raises(ValueError, match="labels='word': choose 'digits' or 'words'"):
        task.labels("word")


def test_local_task():
    template = "{headline}\nSarcastic? {{yes/no}} {headline} by {author name}"
    task = local_task(template, {1: "yes", 0: "no"}, max_length=64)
    assert (task.name, task.hub, task.max_length, task.metrics) == ("local", None, 64, ("accuracy",))
    assert task.columns == task.source_columns == ("headline", "author name")
    assert (task.label_words, task.label_digits) == (("yes", "no"), ("0", "1"))
    assert render(task, {"headline": "{h}", "author name": 7}) == "{h}\nSarcastic? {yes/no} {h} by 7"


TWO = ["no", "yes"]
REFUSED = [
    ("no field", TWO, {}, "names no column"),
    ("{}", TWO, {}, "a field without a column name"),
    ("{0}", TWO, {}, "a field without a column name"),
    ("{a.__class__}", TWO, {}, r"field '\{a.__class__\}' is refused"),
    ("{a[0]}", TWO, {}, r"field '\{a\[0\]\}' is refused"),
    ("{a!r}", TWO, {}, r"field '\{a!r\}' is refused"),
    ("{a:>10}", TWO, {}, r"field '\{a:>10\}' is refused"),
    ("{a:{b}}", TWO, {}, "is refused"),
    ("{a", TWO, {}, "literal braces"),
    ("{a} {label}", TWO, {}, "shows the label column 'label'"),
    ("{a}", ["no"], {}, "at least 2"),
    ("{a}", ["no", "no"], {}, "label 'no' occurs 2 times"),
    ("{a}", ["no", " no"], {}, "label 'no' occurs 2 times"),
    ("{a}", ["no", ""], {}, "label '' occurs 1 times"),
    ("{a}", {0: False, 1: True}, {}, "label word of 0 is False, not text: write it in quotes"),
    ("{a}", "yes", {}, "give a list of words or a mapping"),
    ("{a}", {1: "a", "1": "b"}, {}, "label '1' stands for two label words"),
    ("{a}", {(1, 2): "a", 1: "b"}, {}, "raw labels are strings, integers or booleans"),
    ("{a}", ["1", "2", "3"], {}, "label word '1' is also the number of another label"),
    ("{a}", ["1.0", "2.0"], {}, "label word '1.0' is also the number of another label"),
    ("{a}", TWO, {"metrics": ["acc"]}, "unknown metric 'acc'"),
    ("{a}", ["x", "y", "z"], {"metrics": ["f1"]}, "use 'f1_macro'"),
    ("{a}", TWO, {"max_length": 0}, "max_length=0"),
]


@pytest.mark.parametrize("template, label_words, options, message", REFUSED)
def test_local_task_refused(template, label_words, options, message):
    with pytest.raises(ValueError, match=message):
        local_task(template, label_words, **options)


def test_a_task_in_a_line():
    assert get_task("glue/sst2").summary("words") == "sentence: sentence negative or positive"
    assert get_task("glue/stsb").summary() == "sentence1: sentence1 sentence2: sentence2 0.0 or 5.0"
    assert local_task("{{a}}\n{text}?", ["no", "yes"]).summary("words") == "{a} text? no or yes"
