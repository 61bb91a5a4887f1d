"""A task's definition: its text template, its labels and its metrics."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from ..utils.messages import shown
from .metrics import check_metrics
from .template import template_columns


@dataclass(frozen=True)
class Task:
    """A task in text-to-text form: classification, regression or free-text answers. Raises ValueError if its parts do
    not fit together.

    `label_digits[i]` and `label_words[i]` are the two ways to write class `i`. The first of `metrics` decides the best
    checkpoint. `max_length` is the recommended limit on the rendered text, in tokens. `columns` are those named in the
    template.
    """

    name: str
    template: str
    label_words: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    hub: tuple[str, str | None] | None = None
    """Path and configuration on the Hub, `("nyu-mll/glue", "sst2")`; None for local files."""
    label_column: str = "label"
    max_length: int = 256
    label_map: tuple[tuple[str | int | bool, int], ...] = ()
    """(raw label, class) pairs; empty: raw integers are classes, raw strings are digits or words."""
    split_names: tuple[str, str, str] = ("train", "validation", "test")
    """The Hub's splits that serve as train, validation and test."""
    split_rule: Literal["size", "halve"] = "size"
    """If there is no labelled test split: "halve" the validation split, or let the "size" of the train split decide."""
    preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = field(default=None, repr=False)
    """Maps a raw row to the values of `columns`; None: they are taken as they are."""
    source_columns: tuple[str, ...] = ()
    """The columns a data file must have for the text; by default `columns`."""
    values: tuple[float, ...] = ()
    """For a regression, the numbers that its classes stand for, rising; a raw label belongs to the nearest one."""
    group_columns: tuple[str, ...] = ()
    """Rows that agree in these text columns form a group: it stays in one split, and `exact_match` counts groups."""
    target_template: str = ""
    """For free-text answers: the template of the answer; such a task has no labels."""
    is_local: bool = False
    """True for a task on the user's own data, to which the papers' rules do not apply."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source_columns", self.source_columns or self.columns)
        if self.label_column in self.source_columns and not self.is_chat:
            raise ValueError(
                f"template {self.template!r} shows the label column '{self.label_column}': "
                "take it out of the template or set another data.label_column"
            )
        if self.is_text:
            if shown_ones := set(self.target_columns) & set(self.columns):
                raise ValueError(f"template {self.template!r} shows the answer's column '{min(shown_ones)}'")
        elif self.num_labels < 2:
            raise ValueError(f"a task needs at least 2 label words, this one has {self.num_labels}")
        for label, count in Counter(label.strip() for label in self.label_words).items():
            if count > 1 or not label:
                raise ValueError(f"label {label!r} occurs {count} times: labels must be distinct and not empty")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: give at least 1 token")
        check_metrics(self.metrics, self.num_labels, is_regression=bool(self.values), is_text=self.is_text)
        if not self.values and not self.is_text:
            self._classes  # raises on an ambiguous label_map  # noqa: B018

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return template_columns(self.template)

    @property
    def is_text(self) -> bool:
        """True if the answers are free text."""
        return bool(self.target_template)

    @property
    def is_chat(self) -> bool:
        """True if a row is a chat, whose last message is the answer."""
        return self.is_text and self.preprocess is not None

    @cached_property
    def target_columns(self) -> tuple[str, ...]:
        """The columns of the answer: the label column, or those of `target_template`."""
        return template_columns(self.target_template) if self.is_text else (self.label_column,)

    @property
    def num_labels(self) -> int:
        return len(self.label_words)

    @property
    def label_digits(self) -> tuple[str, ...]:
        return self.label_words if self.values else tuple(map(str, range(self.num_labels)))

    @property
    def num_outputs(self) -> int:
        """Number of outputs of a classification head: one per class, a single one for a regression."""
        return 1 if self.values else self.num_labels

    def labels(self, form: Literal["digits", "words"] = "digits") -> tuple[str, ...]:
        """Returns the target string of each class; raises ValueError for an unknown `form`."""
        if form not in ("digits", "words"):
            raise ValueError(f"labels={form!r}: choose 'digits' or 'words'")
        return self.label_digits if form == "digits" else self.label_words

    def summary(self, form: Literal["digits", "words"] = "digits") -> str:
        """Summarises the task's template and labels in one line, a text from which to start a prompt."""
        columns = {name: name for name in self.columns}
        labels = self.labels(form) if not self.values else self.label_words[:: len(self.values) - 1]
        return " ".join(f"{self.template.format_map(columns)} {' or '.join(labels)}".split())

    def label_class(self, value: Any) -> int | None:
        """Finds the class (0-based index) of a raw label, or None if the task does not have it.

        Data formats write a label in several ways, so `1`, `1.0`, `"1"`, `"1.0"` and `true` agree, unless the task's
        labels distinguish them; `"01"` is another label.
        """
        if self.values:
            return nearest_value(value, self.values)
        return next((self._classes[form] for form in _spellings(value) if form in self._classes), None)

    @cached_property
    def _classes(self) -> dict[str, int]:
        """Class of each spelling of a raw label; a literal spelling wins over a derived one."""
        classes: dict[str, int] = {}
        derived: dict[str, int] = {}
        for raw, index in self.label_map or enumerate(range(self.num_labels)):
            literal, *others = _spellings(raw)
            if classes.setdefault(literal, index) != index:
                raise ValueError(f"label {raw!r} stands for two label words: write it once (1 and '1' are one label)")
            derived = {**dict.fromkeys(others, index), **derived}
        for index, word in enumerate(self.label_words if not self.label_map else ()):
            literal, *others = _spellings(word)
            if classes.setdefault(literal, index) != index or any(classes.get(form, index) != index for form in others):
                raise ValueError(
                    f"label word '{word}' is also the number of another label: map each raw label to its word, as in "
                    f"label_words={{{word}: '{word}'}}"
                )
            derived |= dict.fromkeys(others, index)  # a raw `True` belongs to the word "True", whatever its index
        return derived | classes


def nearest_value(number: Any, values: Sequence[float], clamp: bool = False) -> int | None:
    """Finds the index of the value nearest to `number` (a number, or text that is one); ties go to the even index.

    Returns None for anything else and outside the range. For the values 0, 0.2, .. 5 this is T5's rule for STS-B,
    `round(5·x) / 5`; the published code of ATTEMPT and DePT computes `round(x, 1)` instead. Differences below a
    ten-thousandth of a step are ignored, so that a number stored in single precision (3.0999999) is rounded as the
    number itself.

    Args:
        clamp: returns the nearer end for a finite number outside the range.
    """
    if isinstance(number, bool):
        return None
    last, step = len(values) - 1, (values[-1] - values[0]) / (len(values) - 1)
    try:
        steps = round((float(number) - values[0]) / step, 4)
    except (TypeError, ValueError, OverflowError):
        return None
    if clamp and math.isfinite(steps):
        steps = min(max(steps, 0), last)
    return round(steps) if 0 <= steps <= last else None


def _spellings(value: Any) -> list[str]:
    """Lists the spellings of a raw label, most literal first; empty for a value that cannot be a label."""
    if isinstance(value, bool):
        return ["true", "1"] if value else ["false", "0"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return [str(value), *(["false"] if value == 0 else ["true"] if value == 1 else [])]
    if isinstance(value, str):
        value = value.strip()
        return list(dict.fromkeys((value, without_point(value))))
    return _spellings(str(value)) if isinstance(value, (Decimal, date)) else []  # from Parquet files


def without_point(text: str) -> str:
    """Normalises whole numbers and booleans: `1.0` becomes `1`, `True` becomes `true`; other labels stay unchanged."""
    whole = re.fullmatch(r"([+-]?\d+)\.0*", text)
    return whole[1] if whole else text.casefold() if text.casefold() in ("true", "false") else text


def local_task(
    template: str,
    label_words: Mapping[Any, str] | Sequence[str] = (),
    *,
    label_column: str = "label",
    metrics: Sequence[str] = ("accuracy",),
    max_length: int = 256,
    values: Sequence[float] = (),
    hub: tuple[str, str | None] | None = None,
    name: str = "local",
    target_template: str = "",
) -> Task:
    """Makes a task on the user's own data: `template` names the text columns, `label_words` the labels.

    `label_words` is either `{raw label: word}` (several raw labels may share a word) or a list of words: raw integers
    index it, raw strings may be the words themselves. `values` instead makes a regression, whose labels are the nearest
    of these evenly spaced numbers; `target_template` makes a task with free-text answers. Raises ValueError if the
    arguments do not make a valid task.
    """
    shared: dict[str, Any] = {"label_column": label_column, "max_length": max_length, "hub": hub, "is_local": True}
    if target_template:
        return Task(name, template, (), tuple(metrics), target_template=target_template, **shared)
    if values:
        steps = [high - low for low, high in pairwise(values)]
        if (
            len(values) < 2
            or not all(map(math.isfinite, values))
            or min(steps) <= 0
            or max(steps) - min(steps) > 1e-6 * (values[-1] - values[0])
        ):
            raise ValueError(f"label_values={shown(list(values))}: give at least 2 numbers, evenly spaced and rising")
        words = tuple(f"{value:.10g}" for value in values)
        return Task(name, template, words, tuple(metrics), values=tuple(values), **shared)
    if not isinstance(label_words, (Mapping, Sequence)) or isinstance(label_words, str):
        raise ValueError(f"label_words={label_words!r}: give a list of words or a mapping {{raw label: word}}")
    is_mapping = isinstance(label_words, Mapping)
    named: dict[Any, str] = dict(label_words if isinstance(label_words, Mapping) else enumerate(label_words))
    for raw, word in named.items():
        if not _spellings(raw):
            raise ValueError(f"label_words has the raw label {raw!r}: raw labels are strings, integers or booleans")
        if not isinstance(word, str):
            raise ValueError(f"the label word of {raw!r} is {word!r}, not text: write it in quotes")
    words = tuple(dict.fromkeys(named.values()) if is_mapping else named.values())
    return Task(
        name=name,
        template=template,
        label_words=words,
        metrics=tuple(metrics),
        **shared,
        label_map=tuple((raw, words.index(word)) for raw, word in named.items()) if is_mapping else (),
    )
