"""The data of a run: the task that the configuration names, with every text within the length limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tasks.encoding import TEXT_IDS, fit_rows
from .config import DataConfig
from ..tasks import Task, TaskData, get_task, load_task, local_task

SPLITS = ("train", "validation", "test")


@dataclass
class RunData:
    """`data` with texts of at most `max_length` tokens; `truncation_rate` is the share of shortened texts, by split."""

    data: TaskData
    max_length: int
    truncation_rate: dict[str, float]


def task_of(config: DataConfig) -> Task:
    """The named task, or the local one that template and label words describe.

    Raises:
        ValueError: neither is given, or there is no such task.
    """
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
    return config.max_length if config.max_length is not None else task.max_length


def load_run_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, task_type: str, seed: int = 0) -> RunData:
    """Loads the three splits and shortens what is too long, or refuses it (`data.on_too_long`).

    `seed` draws the rows of a few-shot run (`data.k_shot`) and nothing else.
    """
    task = task_of(config)
    data = load_task(
        task,
        data_dir=config.data_dir,
        train_file=config.train_file,
        validation_file=config.validation_file,
        test_file=config.test_file,
        labels=config.labels,
        max_train=config.max_train,
        max_validation=config.max_validation,
        max_test=config.max_test,
        k_shot=config.k_shot,
        shot_seed=seed,
    )
    max_length = max_length_of(config, task)
    rates = {}
    for name in SPLITS:
        fitted, rates[name] = fit_split(
            getattr(data, name), task, tokenizer, task_type, max_length, config.on_too_long, name
        )
        setattr(data, name, fitted)
    return RunData(data, max_length, rates)


def fit_split(
    split: Any,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    max_length: int,
    on_too_long: str,
    name: str,
) -> tuple[Any, float]:
    """`split` with `text` within `max_length` tokens, these in `text_ids`, and the share of texts that were shortened.

    Raises:
        ValueError: a text is too long and `on_too_long` is "error"; names the row, its tokens and the limit.
    """
    fitted = fit_rows(
        task, list(split), tokenizer, task_type, max_length, truncate=on_too_long == "truncate", source=name
    )
    texts, ids, is_cut = map(list, zip(*fitted)) if fitted else ([], [], [])
    split = split.remove_columns("text").add_column("text", texts).add_column(TEXT_IDS, ids)
    return split, sum(is_cut) / max(len(split), 1)
