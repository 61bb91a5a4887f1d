"""What a task is: its text template, its labels and its metrics; and what loading one gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from .metrics import check_metrics, compute_metrics
from .template import template_columns

if TYPE_CHECKING:
    from datasets import Dataset

STRETCHES = 5
"""Of a regression's range, when its labels are counted."""


@dataclass(frozen=True)
class Task:
    """A classification task in text-to-text form. Raises ValueError where its parts do not fit together.

    `label_digits[i]` and `label_words[i]` are the two ways to write class `i`. The first of `metrics` decides the best
    checkpoint. `max_length` is the recommended limit in tokens of the rendered text.
    """

    name: str
    columns: tuple[str, ...]
    template: str
    label_digits: tuple[str, ...]
    label_words: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str] | None
    """Path and configuration on the hub, `("nyu-mll/glue", "sst2")`; None for local files."""
    label_column: str = "label"
    max_length: int = 256
    label_map: tuple[tuple[str | int | bool, int], ...] = ()
    """(raw label, class) pairs; empty: raw integers are classes, raw strings are digits or words."""
    split_names: tuple[str, str, str] = ("train", "validation", "test")
    """The hub's splits that serve as train, validation and test."""
    split_rule: Literal["size", "halve"] = "size"
    """Without a labelled test split: "halve" the validation split, or let the train split's "size" decide."""
    preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = field(default=None, repr=False)
    """From a raw row to the values of `columns`; None: they are taken as they are."""
    source_columns: tuple[str, ...] = ()
    """The columns a data file must have for the text; by default `columns`."""
    values: tuple[float, ...] = ()
    """Of a regression: the numbers that its classes stand for, rising; a raw label belongs to the nearest."""
    group_columns: tuple[str, ...] = ()
    """Rows that agree in these text columns belong together: they are never split, and `exact_match` counts them."""

    def __post_init__(self) -> None:
        if not self.source_columns:
            object.__setattr__(self, "source_columns", self.columns)
        if set(template_columns(self.template)) != set(self.columns):
            raise ValueError(
                f"template {self.template!r} does not use exactly the columns {self.columns}: make them agree"
            )
        if self.label_column in self.source_columns:
            raise ValueError(
                f"template {self.template!r} shows the label column '{self.label_column}': "
                "take it out of the template or set another label_column"
            )
        if not len(self.label_digits) == len(self.label_words) >= 2:
            raise ValueError(
                f"{len(self.label_digits)} label digits and {len(self.label_words)} label words: "
                "a task needs as many of one as of the other, and at least 2"
            )
        for labels in (self.label_digits, self.label_words):
            for label, count in Counter(label.strip() for label in labels).items():
                if count > 1 or not label:
                    raise ValueError(f"label {label!r} occurs {count} times: labels must be distinct and not empty")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: give at least 1 token")
        if self.values and len(self.values) != len(self.label_words):
            raise ValueError(f"{len(self.values)} values for {len(self.label_words)} labels: give one for each")
        check_metrics(self.metrics, self.num_labels, regression=bool(self.values))
        self._classes  # raises on an ambiguous label_map  # noqa: B018

    @property
    def num_labels(self) -> int:
        return len(self.label_words)

    @property
    def num_outputs(self) -> int:
        """Outputs of a classification head: one for each class, a single one for a regression."""
        return 1 if self.values else self.num_labels

    def labels(self, form: Literal["digits", "words"] = "digits") -> tuple[str, ...]:
        """The strings that targets are drawn from; raises ValueError for a `form` that is neither digits nor words."""
        if form not in ("digits", "words"):
            raise ValueError(f"labels={form!r}: choose 'digits' or 'words'")
        return self.label_digits if form == "digits" else self.label_words

    def label_class(self, value: Any) -> int | None:
        """The class (0-based index) of a raw label, or None when it is none of the task's.

        Data formats write one label in several ways, so `1`, `1.0`, `"1"` and `true` agree, unless the task's labels
        tell them apart.
        """
        if self.values:
            return nearest_value(value, self.values)
        return next((self._classes[form] for form in _spellings(value) if form in self._classes), None)

    @property
    def allowed_labels(self) -> str:
        """The raw labels the task takes, for messages."""
        if self.values:
            return f"numbers {self.values[0]} .. {self.values[-1]}"
        if self.label_map:
            return ", ".join(repr(raw) for raw, _ in self.label_map)
        return f"0 .. {self.num_labels - 1} or {', '.join(repr(word) for word in self.label_words)}"

    @cached_property
    def _classes(self) -> dict[str, int]:
        raw_labels: Sequence[tuple[str | int | bool, int]] = self.label_map or tuple(enumerate(range(self.num_labels)))
        classes: dict[str, int] = {}
        if self.values:
            return classes
        for raw, index in raw_labels:
            first = _spellings(raw)[0]
            if classes.setdefault(first, index) != index:
                raise ValueError(f"label {raw!r} stands for two label words: write it once (1 and '1' are one label)")
        if not self.label_map:
            for index, word in enumerate(self.label_words):
                if classes.setdefault(word.strip(), index) != index:
                    raise ValueError(
                        f"label word '{word}' is also the number of another label: say which raw label gets which "
                        f"word, as in label_words={{{word}: '{word}'}}"
                    )
        for raw, index in raw_labels:
            for spelling in _spellings(raw)[1:]:
                classes.setdefault(spelling, index)
        return classes


def nearest_value(number: Any, values: Sequence[float]) -> int | None:
    """The index of the value nearest to `number` (a number, or text that is one), of two as near the even index.

    None for what is no number or lies outside. T5's rule for STS-B, `round(5·x) / 5`, on the values 0, 0.2, .. 5: the
    published code of ATTEMPT and DePT computes `round(x, 1)` instead. Four decimals are looked at, so that a number
    stored in single precision (3.0999999) goes where the number itself does.
    """
    if isinstance(number, bool):
        return None
    try:
        number = round(float(number), 4)
    except (TypeError, ValueError, OverflowError):
        return None
    if not values[0] <= number <= values[-1]:
        return None
    step = (values[-1] - values[0]) / (len(values) - 1)
    return round(round((number - values[0]) / step, 6))


def _spellings(value: Any) -> list[str]:
    """The ways a raw label may be written, the most literal first; none for what cannot be a label."""
    if isinstance(value, bool):
        return ["true", "1"] if value else ["false", "0"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return [str(value), *(["false"] if value == 0 else ["true"] if value == 1 else [])]
    if isinstance(value, str):
        value = value.strip()
        return [value, value.casefold()] if value.casefold() in ("true", "false") else [value]
    return []


def local_task(
    template: str,
    label_words: Mapping[Any, str] | Sequence[str],
    *,
    label_column: str = "label",
    metrics: Sequence[str] = ("accuracy",),
    max_length: int = 256,
) -> Task:
    """A task over local files: `template` names the text columns, `label_words` gives the labels' words.

    `label_words` is either `{raw label: word}` (several raw labels may share a word) or a list of words: raw integers
    index it, raw strings may be the words themselves. Raises ValueError where either makes no task.
    """
    columns = template_columns(template)
    label_map: tuple[tuple[str | int | bool, int], ...] = ()
    if isinstance(label_words, Mapping):
        named = list(label_words.items())
        for raw, _ in named:
            if not _spellings(raw):
                raise ValueError(f"label_words has the raw label {raw!r}: raw labels are strings, integers or booleans")
    elif isinstance(label_words, Sequence) and not isinstance(label_words, str):
        named = list(enumerate(label_words))
    else:
        raise ValueError(f"label_words={label_words!r}: give a list of words or a mapping {{raw label: word}}")
    for raw, word in named:
        if not isinstance(word, str):
            raise ValueError(f"the label word of {raw!r} is {word!r}, not text: write it in quotes")
    words = tuple(dict.fromkeys(word for _, word in named)) if isinstance(label_words, Mapping) else tuple(label_words)
    if isinstance(label_words, Mapping):
        label_map = tuple((raw, words.index(word)) for raw, word in named)
    return Task(
        name="local",
        columns=columns,
        template=template,
        label_digits=tuple(map(str, range(len(words)))),
        label_words=words,
        metrics=tuple(metrics),
        hub=None,
        label_column=label_column,
        max_length=max_length,
        label_map=label_map,
    )


@dataclass
class TaskData:
    """A task's three splits, no text in two of them.

    Each row has `text: str` (the rendered input), `label: int` (the class), `target: str` (`labels[label]`) and
    `fields`: the text columns that `text` was rendered from. Tasks with `group_columns` have `group: int` as well, the
    same number for rows that belong together.
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]

    def balance(self) -> dict[str, float]:
        """The share of each label among the train rows, by its word; of a regression, of five equal stretches."""
        rows = len(self.train)
        if not self.task.values:
            counts = Counter(self.train["label"])
            return {word: counts[label] / rows for label, word in enumerate(self.task.label_words)}
        low, width = self.task.values[0], (self.task.values[-1] - self.task.values[0]) / STRETCHES
        numbers = [self.task.values[label] for label in self.train["label"]]
        counts = Counter(min(int((number - low) / width), STRETCHES - 1) for number in numbers)
        names = [f"{low + i * width:g}-{low + (i + 1) * width:g}" for i in range(STRETCHES)]
        return {name: counts[i] / rows for i, name in enumerate(names)}

    def majority(self) -> float:
        """The task's first metric on `test` for always answering the commonest train label (the lowest of equals)."""
        counts = Counter(self.train["label"])
        commonest = min(counts, key=lambda label: (-counts[label], label))
        references = list(self.test["label"])
        metric = self.task.metrics[0]
        found = [commonest] * len(references)
        scores = compute_metrics([metric], found, references, self.task.num_labels, values=self.task.values)
        return scores[metric]
