"""Scores of a task from lists of class indices, computed with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

UNPARSABLE = -1
"""The prediction that stands for generated text that is none of the task's labels."""


def compute_metrics(
    names: Sequence[str], predictions: Sequence[int], references: Sequence[int], num_labels: int
) -> dict[str, float]:
    """The named metrics of `predictions` against `references`, both class indices in `0 .. num_labels-1`.

    A prediction of -1 is unparsable and always counts as wrong. `accuracy` needs no more than that. `f1` and
    `matthews_correlation` take it for a wrong class, the one after the right one (with two classes: the other one, as
    ATTEMPT's evaluation does). `f1_macro` counts it as a miss of the right class and as a hit of none.

    Returns `{name: value}`: 0..1 for accuracy and F1, -1..1 for the Matthews correlation (0 where it is undefined).
    Raises ValueError for an unknown metric, `f1` with other than two classes, unequal lengths, nothing to score, or an
    index outside the range.
    """
    check_metrics(names, num_labels)
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one for each")
    if not len(references):
        raise ValueError("0 predictions: there is nothing to score, give at least one")
    _check_range("reference", references, 0, num_labels)
    _check_range("prediction", predictions, UNPARSABLE, num_labels)
    return {name: float(METRICS[name](list(predictions), list(references), num_labels)) for name in names}


def check_metrics(names: Sequence[str], num_labels: int) -> None:
    """Raises ValueError where `compute_metrics` would refuse `names` for that many classes."""
    if not names:
        raise ValueError(f"0 metrics given: name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown metric '{name}': did you mean '{close}'? Known: {', '.join(METRICS)}")
        if name == "f1" and num_labels != 2:
            raise ValueError(f"metric 'f1' is for 2 labels, the task has {num_labels}: use 'f1_macro'")


def _check_range(what: str, values: Sequence[int], low: int, num_labels: int) -> None:
    for position, value in enumerate(values):
        if not low <= value < num_labels:
            raise ValueError(
                f"{what} {position} is {value}, outside {low} .. {num_labels - 1} for {num_labels} labels: "
                "map it to a label's index first"
            )


def _unparsable_as_wrong_class(predictions: list[int], references: list[int], num_labels: int) -> list[int]:
    return [(r + 1) % num_labels if p == UNPARSABLE else p for p, r in zip(predictions, references)]


def _accuracy(predictions: list[int], references: list[int], num_labels: int) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(references, predictions)


def _f1(predictions: list[int], references: list[int], num_labels: int) -> float:
    from sklearn.metrics import f1_score

    predictions = _unparsable_as_wrong_class(predictions, references, num_labels)
    return f1_score(references, predictions, labels=[0, 1], average="binary", zero_division=0.0)


def _f1_macro(predictions: list[int], references: list[int], num_labels: int) -> float:
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, labels=list(range(num_labels)), average="macro", zero_division=0.0)


def _matthews(predictions: list[int], references: list[int], num_labels: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(references, _unparsable_as_wrong_class(predictions, references, num_labels))


METRICS: dict[str, Callable[[list[int], list[int], int], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
}
"""Known metrics; each takes predictions, references and the number of classes."""
