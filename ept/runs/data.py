"""The data of a run: the task, named or inferred from the rows, and every text within the length limit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tasks import Task, TaskData, get_task, load_task, local_task
from ..tasks.chat import chat_task, find_chats
from ..tasks.drawing import SPLITS
from ..tasks.encoding import TEXT_IDS, FittedText, encode_answers, fit_rows
from ..tasks.inference import (
    commonest_share,
    default_metrics,
    default_template,
    find_columns,
    find_labels,
    find_texts,
    split_notes,
    unread_notes,
    unread_texts,
)
from ..tasks.metrics import OF_NUMBERS
from ..tasks.sources import RawSplits, raw_splits
from ..tasks.splits import checksum_of
from ..tasks.template import template_columns
from ..utils.messages import shares
from .config import DataConfig
from .folder import SPLITS_FILE

logger = logging.getLogger(__name__)

USUAL_TEXT_METRICS = ("rouge_l", "exact_match")  # of free-text answers, if none are given
MOST = 0.5  # share of train texts with unknown tokens above which there is a warning
FILES = {"train_file", "validation_file", "test_file"}


@dataclass
class RunData:
    """The splits of a run, made by `with_texts`, and the share of shortened texts in each.

    `cut_answers` is the share of free-text answers with more than `data.max_answer` tokens, and `unread_texts` the
    share of texts with unknown tokens.
    """

    data: TaskData
    truncation_rate: dict[str, float]
    cut_answers: dict[str, float] = field(default_factory=dict)
    unread_texts: dict[str, float] = field(default_factory=dict)


class OwnRows:
    """The rows of the user's own data, read once: for inferring options, and then for the splits."""

    def __init__(self) -> None:
        self._read: RawSplits | None = None

    def of(self, config: DataConfig) -> RawSplits:
        """Returns the rows, reading them on first use."""
        if self._read is None:
            files = _files(config)
            self._read = raw_splits(config.data_dir, files, config.encoding, hub=_hub(config), names_labels=True)
        return self._read

    def take(self) -> RawSplits | None:
        """Returns the rows if they have been read (else None) and drops them from here."""
        read, self._read = self._read, None
        return read


def load_run_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    seed: int = 0,
    rows: OwnRows | None = None,
) -> RunData:
    """Loads the three splits and shortens texts that are too long, or refuses them (`data.on_too_long`).

    `seed` is used only to draw the rows of a few-shot run (`data.k_shot`); `rows` are those with which `config` was
    resolved. Raises as `load_task` and `fit_rows` do.
    """
    rows = rows or OwnRows()
    config = resolved(config, task_type, rows)
    task = task_of(config, tokenizer)
    if task.is_text and task_type == "SEQ_CLS":
        raise ValueError(
            "answers in free text need a language model, but this one is a classifier: give another model, or leave "
            "data.target_template out"
        )
    given = config.model_dump(include={"data_dir", "encoding", "strict", "k_shot", *FILES})
    limits = config.model_dump(include={"max_train", "max_validation", "max_test"})
    drawn = read_splits(Path(config.splits)) if config.splits is not None else None
    data = load_task(task, **given, **limits, labels=config.label_form, shot_seed=seed, drawn=drawn, raw=rows.take())
    max_length, truncate = max_length_of(config, task), config.on_too_long == "truncate"

    def fit(rows: list[Any], source: str) -> list[FittedText]:
        return fit_rows(task, rows, tokenizer, task_type, max_length, truncate=truncate, source=source)

    data, rates = with_fitted_texts(data, fit)
    cut_answers = _cut_answers(data, tokenizer, task_type, config.max_answer) if task.is_text else {}
    return RunData(data, rates, cut_answers, _unread_texts(data, tokenizer))


def with_fitted_texts(
    data: TaskData, fit: Callable[[list[Any], str], list[FittedText]]
) -> tuple[TaskData, dict[str, float]]:
    """Sets each split's texts to what `fit` makes of its rows; returns the data and the shares of cut texts."""
    splits, rates = {}, {}
    for name in SPLITS:
        split = getattr(data, name)
        splits[name], rates[name] = with_texts(split, fit(list(split), name))
    return replace(data, **splits), rates


def _unread_texts(data: TaskData, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Computes the share of texts in each split that contain the unknown token.

    Warns if that is most of them. Empty if the tokenizer can encode anything: its unknown token then has another use.
    """
    unknown, unread = tokenizer.unk_token_id, {}
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if unknown is None or unknown in others:
        return {}
    for name in SPLITS:
        texts = getattr(data, name)[TEXT_IDS][:]
        unread[name] = sum(unknown in ids for ids in texts) / max(len(texts), 1)
    if unread["train"] > MOST:
        logger.warning(
            "the tokenizer does not know part of %.0f%% of the train texts and reads it as %s: use a model that was "
            "trained on such texts",
            *(100 * unread["train"], tokenizer.unk_token),
        )
    return unread


def _cut_answers(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, task_type: str, max_answer: int
) -> dict[str, float]:
    """Computes the share of free-text answers that are cut in each split, and warns if there are any."""
    cut = {}
    for name in SPLITS:
        answers = getattr(data, name)["target"][:]
        encoded = encode_answers(tokenizer, answers, task_type, None, spaced=not data.task.is_chat)
        cut[name] = sum(len(ids) > max_answer for ids in encoded) / max(len(encoded), 1)
    if any(cut.values()):
        logger.warning(
            "answers of more than data.max_answer=%d tokens are cut, so the model does not learn to end them: %s; "
            "raise data.max_answer, or shorten the answers",
            *(max_answer, shares(cut)),
        )
    return cut


def with_texts(split: Any, fitted: Sequence[FittedText]) -> tuple[Any, float]:
    """Sets the texts of `split` and, in column `text_ids`, their tokens; also returns the share of cut texts."""
    split = split.remove_columns([name for name in ("text", TEXT_IDS) if name in split.column_names])
    split = split.add_column("text", [row.text for row in fitted])
    split = split.add_column(TEXT_IDS, [row.ids for row in fitted])
    return split, sum(row.is_cut for row in fitted) / max(len(fitted), 1)


def describe(data: TaskData) -> dict[str, Any]:
    """Describes a task's rows: number in each split, balance of labels, two examples, with different labels if any."""
    classes = list(data.train["label"])
    other = next((i for i, label in enumerate(classes) if label != classes[0]), 1)
    examples = data.train.select([i for i in (0, other) if i < len(classes)])
    return {
        "rows": {name: len(getattr(data, name)) for name in SPLITS},
        "left_out": data.left_out,
        "label_balance": data.balance(),
        "majority": data.majority(),
        "examples": [{"text": row["text"], "target": row["target"]} for row in examples],
    }


def resolved(config: DataConfig, task_type: str | None, rows: OwnRows | None = None) -> DataConfig:
    """Returns the configuration completed with what is inferred from the train rows of the user's own data.

    Raises ValueError if there are no data, or if it is unclear which columns are text and label.

    Args:
        task_type: of the model; for all but classifiers, the template asks for the label by its column's name.
        rows: keeps what is read, for `load_run_data`.
    """
    own = rows or OwnRows()
    labelled = config.label_words is not None or config.label_values is not None
    if config.target_template is not None:
        return _with_free_text(config, own)
    if config.chat_column is not None:
        return config.model_copy(update={"metric": config.metric or list(USUAL_TEXT_METRICS)})
    if not config.is_local or (labelled and None not in (config.template, config.label_column, config.metric)):
        return config
    raw = own.of(config)
    source, train = raw["train"]
    given = labelled or config.label_column is not None or config.template is not None
    if not given and (chats := find_chats(train)) is not None:
        return resolved(config.model_copy(update={"chat_column": chats}), task_type)
    texts = list(template_columns(config.template)) if config.template is not None else config.text_columns
    texts, label = find_columns(train, source, texts, config.label_column)
    notes: list[str] = []
    asks = task_type != "SEQ_CLS"
    found: dict[str, Any] = {"label_column": label}
    found["template"] = config.template or default_template(texts, label, asks)
    if not labelled:
        labels = find_labels(train, label, source, asks, config.kind)
        found |= {"kind": None, "label_words": labels.words, "label_values": labels.values, "metric": labels.metrics}
        notes += labels.notes
        if config.template is None and config.text_columns is None:
            words = [*labels.words.values()] if isinstance(labels.words, dict) else labels.words or []
            notes += unread_notes(train, texts, label, words)
    elif config.label_words is not None:
        task = local_task(found["template"], config.label_words, label_column=label)
        found["metric"] = default_metrics(commonest_share([task.label_class(row.get(label)) for row in train]))
    _warn(raw, notes)
    found["metric"] = config.metric or found.get("metric")
    return config.model_copy(update={**found, "text_columns": None})


def row_checksums(config: DataConfig) -> dict[str, str]:
    """Computes the checksum of each given split's rows, as in a run's `splits.json`. Raises as `load_task` does."""
    if config.task is None:
        raw = OwnRows().of(config)
    else:
        task, files = get_task(config.task), _files(config)
        raw = raw_splits(config.data_dir, files, config.encoding, hub=task.hub, hub_names=task.split_names)
    return {split: checksum_of(rows) for split, (_, rows) in raw.items()}


def _with_free_text(config: DataConfig, own: OwnRows) -> DataConfig:
    """Returns the configuration of a task with free-text answers, with template and metrics filled in."""
    answer = template_columns(str(config.target_template))
    template = config.template
    if template is None:
        raw = own.of(config)
        source, rows = raw["train"]
        others = [{name: value for name, value in row.items() if name not in answer} for row in rows]
        texts = find_texts(others, source, config.text_columns)
        template = default_template(texts, answer[0], asks=True)
        _warn(raw, unread_texts(others, texts) if config.text_columns is None else [])
    found = {"template": template, "text_columns": None, "metric": config.metric or list(USUAL_TEXT_METRICS)}
    return config.model_copy(update=found)


def _warn(raw: RawSplits, notes: Sequence[str]) -> None:
    """Logs `notes` on the train rows, and a note if a column names splits although they are drawn."""
    source, train = raw["train"]
    for note in [*(split_notes(train) if {*raw} == {"train"} else []), *notes]:
        logger.warning("%s: %s", source, note)


def read_splits(path: Path) -> Any:
    """Reads which rows are in which split, from a run's folder or from the file itself."""
    file = path / SPLITS_FILE if path.is_dir() else path
    try:
        drawn = json.loads(file.read_text(encoding="utf-8"))
        if all({"from", "sha256", "rows"} <= set(drawn[split]) for split in SPLITS):
            return drawn
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.splits={path}: no such file {file}: name the folder of a run") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} does not say which rows are in which split: name the folder of a run (data.splits)")


def task_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Task:
    """Returns the named task, or makes it from template and labels; raises ValueError if there is neither.

    `tokenizer` is needed to format chats.
    """
    if config.task is not None:
        return get_task(config.task)
    if config.chat_column is not None and tokenizer is not None:
        limits: Any = {"metrics": config.metric or USUAL_TEXT_METRICS, "max_length": config.max_length or 256}
        return chat_task(config.chat_column, tokenizer, name=config.name, hub=_hub(config), **limits)
    if config.template is None or all(
        given is None for given in (config.label_words, config.label_values, config.target_template)
    ):
        raise ValueError(
            "no data: give a file, as in `ept train FILE --model NAME`, or set data.task (`ept tasks` lists them)"
        )
    usual: Sequence[str] = ("accuracy",) if config.label_values is None else OF_NUMBERS
    if config.target_template is not None:
        usual = USUAL_TEXT_METRICS
    return local_task(
        config.template,
        config.label_words or (),
        label_column=config.label_column or "label",
        metrics=config.metric or usual,
        max_length=config.max_length or 256,
        values=config.label_values or (),
        target_template=config.target_template or "",
        hub=_hub(config),
        name=config.name,
    )


def _files(config: DataConfig) -> dict[str, str | None]:
    """Maps each split to its file, if given."""
    return {name.removesuffix("_file"): getattr(config, name) for name in FILES}


def _hub(config: DataConfig) -> tuple[str, str | None] | None:
    """Splits a Hub name into dataset and configuration."""
    if config.hub is None:
        return None
    name, _, configuration = config.hub.partition(":")
    return name, configuration or None


def max_length_of(config: DataConfig, task: Task) -> int:
    """Returns the configured limit in tokens, or else the task's own."""
    return config.max_length if config.max_length is not None else task.max_length
