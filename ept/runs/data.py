"""The data of a run: the task that the configuration names, with every text within the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tasks import Task, TaskData, get_task, load_task, local_task
from ..tasks.encoding import TEXT_IDS, FittedText, fit_rows
from .config import DataConfig

SPLITS = ("train", "validation", "test")


@dataclass
class RunData:
    """The splits of a run, made by `with_texts`, and the share of shortened texts in each."""

    data: TaskData
    truncation_rate: dict[str, float]


def load_run_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, task_type: str, seed: int = 0) -> RunData:
    """Loads the three splits and shortens what is too long, or refuses it (`data.on_too_long`).

    `seed` draws the rows of a few-shot run (`data.k_shot`) and nothing else. Raises as `load_task` and `fit_rows`.
    """
    task = task_of(config)
    where = config.model_dump(include={"data_dir", "train_file", "validation_file", "test_file", "labels", "k_shot"})
    limits = config.model_dump(include={"max_train", "max_validation", "max_test"})
    data = load_task(task, **where, **limits, shot_seed=seed)
    max_length, truncate = max_length_of(config, task), config.on_too_long == "truncate"
    splits, rates = {}, {}
    for name in SPLITS:
        split = getattr(data, name)
        fitted = fit_rows(task, list(split), tokenizer, task_type, max_length, truncate=truncate, source=name)
        splits[name], rates[name] = with_texts(split, fitted)
    return RunData(replace(data, **splits), rates)


def with_texts(split: Any, fitted: Sequence[FittedText]) -> tuple[Any, float]:
    """Gives `split` these texts and, in column `text_ids`, their tokens; returns the share of cut texts with it."""
    split = split.remove_columns("text").add_column("text", [row.text for row in fitted])
    split = split.add_column(TEXT_IDS, [row.ids for row in fitted])
    return split, sum(row.is_cut for row in fitted) / max(len(fitted), 1)


def describe(data: TaskData) -> dict[str, Any]:
    """Describes a task's rows: how many each split has, the balance of labels, two examples of different labels."""
    classes = list(data.train["label"])
    other = next((i for i, label in enumerate(classes) if label != classes[0]), 1)
    examples = data.train.select([i for i in (0, other) if i < len(classes)])
    return {
        "rows": {name: len(getattr(data, name)) for name in SPLITS},
        "label_balance": data.balance(),
        "majority": data.majority(),
        "examples": [{"text": row["text"], "target": row["target"]} for row in examples],
    }


def task_of(config: DataConfig) -> Task:
    """Finds the named task, or makes the local one that template and label words describe; else ValueError."""
    if config.task is not None:
        return get_task(config.task)
    if config.template is None or config.label_words is None:
        raise ValueError(
            "no data: set data.task (see `ept tasks`), or data.train_file with data.template and data.label_words"
        )
    return local_task(
        config.template,
        config.label_words,
        label_column=config.label_column,
        metrics=config.metric or ("accuracy",),
        **({} if config.max_length is None else {"max_length": config.max_length}),
    )


def max_length_of(config: DataConfig, task: Task) -> int:
    """Returns the configured limit in tokens, else the task's own."""
    return config.max_length if config.max_length is not None else task.max_length
