"""The GLUE and SuperGLUE tasks in the text-to-text form of ATTEMPT and DePT, without the task's name in front."""

from __future__ import annotations

from .rows import mark_spans, strip_markup
from .task import Task

_ENTAILMENT = ("entailment", "not_entailment")


_SIMILARITIES = tuple(i / 5 for i in range(26))  # 0.0, 0.2, .. 5.0: STS-B's scores as T5 rounds them


def _glue(config: str, columns: tuple[str, ...], words: tuple[str, ...], **fields) -> Task:
    return Task(
        name=f"glue/{config}",
        columns=columns,
        template=" ".join(f"{column}: {{{column}}}" for column in columns),
        label_words=words,
        hub=("nyu-mll/glue", config),
        **{"label_digits": tuple(map(str, range(len(words)))), "metrics": ("accuracy",), **fields},
    )


GLUE: tuple[Task, ...] = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), metrics=("matthews_correlation",)),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        split_names=("train", "validation_mismatched", "validation_matched"),
    ),
    _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
    _glue("qnli", ("question", "sentence"), _ENTAILMENT),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
    _glue("rte", ("sentence1", "sentence2"), _ENTAILMENT),
    _glue("sst2", ("sentence",), ("negative", "positive")),
    _glue(
        "stsb",
        ("sentence1", "sentence2"),
        tuple(map(str, _SIMILARITIES)),
        label_digits=tuple(map(str, _SIMILARITIES)),
        values=_SIMILARITIES,
        metrics=("pearson", "spearman"),
    ),
)

_FALSE_TRUE = ("False", "True")


def _super_glue(name: str, columns: tuple[str, ...], words: tuple[str, ...], **fields) -> Task:
    return Task(
        name=f"super_glue/{name}",
        columns=columns,
        template=" ".join(f"{column}: {{{column}}}" for column in columns),
        label_digits=tuple(map(str, range(len(words)))),
        label_words=words,
        **{"metrics": ("accuracy",), "hub": ("aps/super_glue", name), **fields},
    )


SUPER_GLUE: tuple[Task, ...] = (
    _super_glue("boolq", ("question", "passage"), _FALSE_TRUE),
    _super_glue(
        "cb",
        ("premise", "hypothesis"),
        ("entailment", "contradiction", "neutral"),
        metrics=("f1_macro", "accuracy"),
    ),
    _super_glue(
        "multirc",
        ("question", "answer", "paragraph"),
        _FALSE_TRUE,
        metrics=("f1", "exact_match", "accuracy"),  # F1 over all answers; exact match over the questions
        group_columns=("paragraph", "question"),
        max_length=348,
        split_rule="halve",  # the papers' choice, although its train split is large
        preprocess=strip_markup,
    ),
    _super_glue("wic", ("sentence1", "sentence2", "word"), _FALSE_TRUE),
    _super_glue(
        "wsc",
        ("text",),
        _FALSE_TRUE,
        hub=("aps/super_glue", "wsc.fixed"),
        preprocess=mark_spans,
        source_columns=("text", "span1_index", "span1_text", "span2_index", "span2_text"),
    ),
)
