"""The known tasks, one entry each: GLUE and SuperGLUE.

Text and labels are written as in ATTEMPT and DePT, without the task's name in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from .rows import as_text, is_number
from .task import Task

_HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
_SCORES = tuple(i / 5 for i in range(26))  # 0.0, 0.2, .. 5.0: STS-B's, as T5 rounds them
_WSC_COLUMNS = ("text", "span1_index", "span1_text", "span2_index", "span2_text")
_MNLI_SPLITS = ("train", "validation_mismatched", "validation_matched")


def _task(name: str, columns: str, words: str, metrics: str = "accuracy", **fields: Any) -> Task:
    """Makes an entry for the Hub dataset of this name with the usual template, `column: {column}` for each column.

    `columns`, `words` and `metrics` are space-separated lists.
    """
    suite, config = name.split("/")
    template = " ".join(f"{column}: {{{column}}}" for column in columns.split())
    fields = {"hub": (_HUB[suite], config), **fields}
    return Task(name, template, tuple(words.split()), tuple(metrics.split()), **fields)


def strip_markup(row: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the HTML tags from MultiRC's columns: `<br>` becomes a space, `<b>` and `</b>` are dropped."""
    texts = {column: as_text(column, row[column]) for column in ("question", "answer", "paragraph")}
    return {column: re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", " ", text)) for column, text in texts.items()}


def mark_spans(row: Mapping[str, Any]) -> dict[str, str]:
    """Marks WSC's noun as `* noun *` and its pronoun as `# pronoun #`, as T5's preprocessing does.

    `spanN_index` counts words separated by white space. If the span is not at its index (in a few rows of the
    uncorrected dataset), its nearest occurrence is marked; raises ValueError if there is none.
    """
    text = as_text("text", row["text"])
    inserts: list[tuple[int, str]] = []
    for number, mark in ((1, "*"), (2, "#")):
        span, place = as_text(f"span{number}_text", row[f"span{number}_text"]), row[f"span{number}_index"]
        if not is_number(place) or not math.isfinite(float(place)):
            raise ValueError(f"column 'span{number}_index' holds {place!r}: give the number of words before the span")
        index = int(float(place))
        pattern = re.compile(r"\s+".join(map(re.escape, span.split())) + r"(?!\w)", re.IGNORECASE)
        starts = [word.start() for word in re.finditer(r"\S+", text)]
        hits = [(abs(i - index), hit.span()) for i, start in enumerate(starts) if (hit := pattern.match(text, start))]
        if not span.strip() or not hits:
            raise ValueError(f"span {span!r} does not occur in the text {text!r}: correct the span or drop the row")
        _, (start, end) = min(hits)
        inserts += [(start, f"{mark} "), (end, f" {mark}")]
    for position, mark in sorted(inserts, reverse=True):
        text = text[:position] + mark + text[position:]
    return {"text": text}


_ENTRIES = (
    _task("glue/cola", "sentence", "unacceptable acceptable", "matthews_correlation"),
    _task("glue/mnli", "premise hypothesis", "entailment neutral contradiction", split_names=_MNLI_SPLITS),
    _task("glue/mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
    _task("glue/qnli", "question sentence", "entailment not_entailment"),
    _task("glue/qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
    _task("glue/rte", "sentence1 sentence2", "entailment not_entailment"),
    _task("glue/sst2", "sentence", "negative positive"),
    _task("glue/stsb", "sentence1 sentence2", " ".join(map(str, _SCORES)), "pearson spearman", values=_SCORES),
    _task("super_glue/boolq", "question passage", "False True"),
    _task("super_glue/cb", "premise hypothesis", "entailment contradiction neutral", "f1_macro accuracy"),
    _task(
        "super_glue/multirc",
        "question answer paragraph",
        "False True",
        "f1 exact_match accuracy",  # F1 over all answers; exact match over the questions
        group_columns=("paragraph", "question"),
        max_length=348,
        split_rule="halve",  # the papers' choice, although the train split is large
        preprocess=strip_markup,
    ),
    _task("super_glue/wic", "sentence1 sentence2 word", "False True"),
    _task(
        "super_glue/wsc",
        "text",
        "False True",
        hub=("aps/super_glue", "wsc.fixed"),
        preprocess=mark_spans,
        source_columns=_WSC_COLUMNS,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ENTRIES}


def get_task(name: str) -> Task:
    """Looks a task up by its name. Raises ValueError for an unknown one, with the nearest known name."""
    if name in TASKS:
        return TASKS[name]
    # The short form counts too: "sst" is nearer to "glue/sst2" than to "glue/rte".
    forms = {form: known for known in TASKS for form in (known, known.split("/")[1])}
    nearest = forms[get_close_matches(name.lower(), forms, n=1, cutoff=0.0)[0]]
    raise ValueError(f"unknown task '{name}': did you mean '{nearest}'? `ept tasks` lists the {len(TASKS)} known tasks")
