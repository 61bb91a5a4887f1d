"""The GLUE tasks in the text-to-text form of ATTEMPT and DePT, without the task's name in front."""

from __future__ import annotations

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
