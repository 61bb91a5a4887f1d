"""Scores of a task from lists of class indices, computed with scikit-learn and scipy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

UNPARSABLE = -1
"""The prediction that stands for generated text that is none of the task's labels."""
UNPARSABLE_VALUE = -1.0
"""What a regression takes for such text, as ATTEMPT's evaluation does."""


@dataclass(frozen=True)
class Answers:
    """What a metric looks at: class indices, and for some the classes' `values` or the rows' `groups`."""

    predictions: list[int]
    references: list[int]
    num_labels: int
    values: Sequence[float] = ()
    groups: Sequence[int] = ()

    def unparsable_as_wrong_class(self) -> list[int]:
        """The predictions, with the class after the right one for unparsable text."""
        pairs = zip(self.predictions, self.references)
        return [(right + 1) % self.num_labels if found == UNPARSABLE else found for found, right in pairs]

    def numbers(self) -> tuple[list[float], list[float]]:
        """Predictions and references of a regression as the numbers that the classes stand for."""
        found = [UNPARSABLE_VALUE if i == UNPARSABLE else self.values[i] for i in self.predictions]
        return found, [self.values[i] for i in self.references]


def compute_metrics(
    names: Sequence[str],
    predictions: Sequence[int],
    references: Sequence[int],
    num_labels: int,
    *,
    values: Sequence[float] = (),
    groups: Sequence[int] | None = None,
) -> dict[str, float]:
    """The named metrics of `predictions` against `references`, both class indices in `0 .. num_labels-1`.

    A prediction of -1 is unparsable and always counts as wrong. `accuracy` and `exact_match` need no more than that.
    `f1` and `matthews_correlation` take it for a wrong class, the one after the right one (with two classes: the other
    one, as ATTEMPT's evaluation does). `f1_macro` counts it as a miss of the right class and as a hit of none. For
    `pearson` and `spearman` it is the number -1.

    Args:
        values: of a regression, the number that each class stands for.
        groups: for `exact_match`, which rows belong together; None: every row stands alone.

    Returns `{name: value}`: 0..1 for accuracy, F1 and exact match (the share of groups without a mistake), -1..1 for
    the correlations (0 where they are undefined). Raises ValueError for an unknown metric or one that does not fit the
    labels, unequal lengths, nothing to score, or an index outside the range.
    """
    check_metrics(names, num_labels, regression=bool(values))
    groups = range(len(references)) if groups is None else groups
    if not len(predictions) == len(references) == len(groups):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references in {len(groups)} groups: "
            "give one for each"
        )
    if not len(references):
        raise ValueError("0 predictions: there is nothing to score, give at least one")
    _check_range("reference", references, 0, num_labels)
    _check_range("prediction", predictions, UNPARSABLE, num_labels)
    answers = Answers(list(predictions), list(references), num_labels, values, groups)
    return {name: float(METRICS[name](answers)) for name in names}


def check_metrics(names: Sequence[str], num_labels: int, regression: bool = False) -> None:
    """Raises ValueError where `compute_metrics` would refuse `names` for that many classes."""
    if not names:
        raise ValueError(f"0 metrics given: name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown metric '{name}': did you mean '{close}'? Known: {', '.join(METRICS)}")
        if name == "f1" and num_labels != 2:
            raise ValueError(f"metric 'f1' is for 2 labels, the task has {num_labels}: use 'f1_macro'")
        if name in CORRELATIONS and not regression:
            raise ValueError(f"metric '{name}' is for a regression, the task has {num_labels} labels: use 'accuracy'")


def _check_range(what: str, values: Sequence[int], low: int, num_labels: int) -> None:
    for position, value in enumerate(values):
        if not low <= value < num_labels:
            raise ValueError(
                f"{what} {position} is {value}, outside {low} .. {num_labels - 1} for {num_labels} labels: "
                "map it to a label's index first"
            )


def _accuracy(answers: Answers) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(answers.references, answers.predictions)


def _f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    found = answers.unparsable_as_wrong_class()
    return f1_score(answers.references, found, labels=[0, 1], average="binary", zero_division=0.0)


def _f1_macro(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    labels = list(range(answers.num_labels))
    return f1_score(answers.references, answers.predictions, labels=labels, average="macro", zero_division=0.0)


def _matthews(answers: Answers) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(answers.references, answers.unparsable_as_wrong_class())


def _exact_match(answers: Answers) -> float:
    right: dict[int, bool] = defaultdict(lambda: True)
    for group, found, reference in zip(answers.groups, answers.predictions, answers.references):
        right[group] &= found == reference
    return sum(right.values()) / len(right)


def _pearson(answers: Answers) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, answers)


def _spearman(answers: Answers) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, answers)


def _correlation(function: Callable, answers: Answers) -> float:
    """0 where one side does not vary: a model that always gives the same answer has learned nothing."""
    found, references = answers.numbers()
    if len(set(found)) < 2 or len(set(references)) < 2:
        return 0.0
    correlation = function(found, references).statistic
    return 0.0 if math.isnan(correlation) else correlation


CORRELATIONS = ("pearson", "spearman")
METRICS: dict[str, Callable[[Answers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "exact_match": _exact_match,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""Known metrics."""
