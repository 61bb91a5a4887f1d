"""The answers of a model on a split: their scores, and what the scores alone do not show.

A model that gives the same answer for every row can have a good accuracy; it is reported as constant here.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tasks import UNPARSABLE
from ..tasks.metrics import CORRELATIONS, metric_name

CONSTANT_SHARE = 0.99
"""A model that gives one answer for at least this share of the rows is called constant."""
CONSTANT_SPREAD = 0.05
"""So is a model whose numbers have less than this share of the true numbers' standard deviation."""
_NO_LABEL = "(no label)"
_CALIBRATION_BINS = 10
_CERTAINTY = 1.96  # standard errors, for 95 %


class Answer(NamedTuple):
    """The index of the label that a model chose for a text (-1: none), and the probability of each label.

    The probabilities are normalised over the labels; None if the answer was generated or is a number. `number` is the
    output of a classifier's regression head, and `label` then the nearest label.
    """

    label: int
    probabilities: tuple[float, ...] | None = None
    number: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The answers to the rows of a split, with the true ones.

    `metrics` has the task's metrics, the first of which decides, and the share of `unparsable` answers; `labels` are
    the label words; `right_numbers` the true numbers, if the answers are numbers.
    """

    metrics: dict[str, float]
    answers: Sequence[Answer]
    references: Sequence[int]
    labels: Sequence[str]
    is_regression: bool = False
    right_numbers: Sequence[float] = ()
    shares: dict[str, float] = field(init=False)
    """Share of each label among the answers, the commonest first."""

    def __post_init__(self) -> None:
        counts = Counter(self.labels[a.label] if a.label != UNPARSABLE else _NO_LABEL for a in self.answers)
        object.__setattr__(self, "shares", {name: n / len(self.answers) for name, n in counts.most_common()})

    @property
    def is_constant(self) -> bool:
        return self.constancy() is not None

    def constancy(self) -> str | None:
        """Describes a model that gives one answer whatever the text; None if it does not."""
        found = [answer.number for answer in self.answers if answer.number is not None]
        if not found or not all(map(math.isfinite, found)):
            return one_answer(self.shares, self.references)
        is_constant = statistics.pstdev(found) < CONSTANT_SPREAD * statistics.pstdev(self.right_numbers)
        return f"answers about {statistics.fmean(found):,.6g} to all rows" if is_constant else None

    def verdict(self, majority: float) -> str | None:
        """Says why the score is worthless, if it is: constant answers, or no better than the commonest label.

        Args:
            majority: the first metric of always giving the commonest train label on the same rows.
        """
        if (text := self.constancy()) is not None:
            return text
        name, score = next(iter(self.metrics.items()))
        error = _CERTAINTY * standard_error(name, majority, len(self.answers))
        if score > majority + error:
            return None
        scored = f"{metric_name(name, self.labels)} {score:.3f}"
        return (
            f"scores {scored}, which is not above that of always giving the commonest label, {majority:.3f}, "
            f"by more than chance ({error:.3f} on {len(self.answers):,} rows)"
        )

    def by_label(self) -> dict[str, dict[str, float]]:
        """Computes precision, recall, F1 and the number of rows of each label."""
        from sklearn.metrics import precision_recall_fscore_support

        numbers = precision_recall_fscore_support(
            self.references, [a.label for a in self.answers], labels=range(len(self.labels)), zero_division=0.0
        )
        keys = ("precision", "recall", "f1", "rows")
        return {name: dict(zip(keys, map(float, row))) for name, row in zip(self.labels, zip(*numbers))}

    def confusion(self) -> tuple[list[str], list[list[int]]]:
        """Counts the answers (columns, with their names) for the rows of each label (rows)."""
        columns = [*range(len(self.labels)), *([UNPARSABLE] if self.metrics.get("unparsable") else [])]
        pairs = Counter(zip(self.references, (a.label for a in self.answers)))
        names = [self.labels[i] if i != UNPARSABLE else _NO_LABEL for i in columns]
        return names, [[pairs[row, column] for column in columns] for row in range(len(self.labels))]

    def confident_mistakes(self, count: int = 10) -> list[int]:
        """Finds the rows with the most confident wrong answers, highest probability first."""
        wrong = [
            (answer.probabilities[answer.label], place)
            for place, (answer, right) in enumerate(zip(self.answers, self.references))
            if answer.probabilities is not None and answer.label != right
        ]
        return [place for _, place in sorted(wrong, key=lambda pair: (-pair[0], pair[1]))[:count]]

    def calibration_error(self) -> float | None:
        """Computes the expected calibration error over ten bins of equal width; None without probabilities.

        It is the mean over the bins, weighted by their sizes, of the distance between the answers' mean probability and
        the share of them that is right (Naeini et al., 2015).
        """
        bins: dict[int, list[tuple[float, bool]]] = {}
        for answer, right in zip(self.answers, self.references):
            if answer.probabilities is None:
                return None
            p = answer.probabilities[answer.label]
            bins.setdefault(min(int(p * _CALIBRATION_BINS), _CALIBRATION_BINS - 1), []).append(
                (p, answer.label == right)
            )
        gaps = (abs(sum(p - is_right for p, is_right in found)) for found in bins.values())
        return sum(gaps) / len(self.answers)

    def summary(self) -> dict[str, Any]:
        """Returns what `results.json` holds in addition to the metrics."""
        found: dict[str, Any] = {"answers": self.shares, "constant": self.is_constant}
        if not self.is_regression:
            found.update(by_label=self.by_label(), calibration_error=self.calibration_error())
        return found


def one_answer(shares: Mapping[str, float], references: Sequence[Any]) -> str | None:
    """Says that the first of `shares` is given to (nearly) all rows; None if it is not, or if all references agree."""
    name, share = next(iter(shares.items()))
    is_constant = share >= CONSTANT_SHARE and len(set(references)) > 1
    return f"answers {name!r} to {share:.0%} of the rows" if is_constant else None


def standard_error(metric: str, score: float, rows: int) -> float:
    """Estimates the standard error of a score on `rows` rows: binomial; for a correlation, that of a zero correlation.

    For R² it is the delta method's, and 1/√rows for a score of at most 0.
    """
    if metric == "r2":
        return (2 * score**0.5 * (1 - score) if score > 0 else 1.0) * max(rows, 1) ** -0.5
    if metric in (*CORRELATIONS, "matthews_correlation"):
        return max(rows, 1) ** -0.5
    return (score * (1 - score) / max(rows, 1)) ** 0.5
