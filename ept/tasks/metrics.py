"""Scores of a task, computed with scikit-learn, scipy and rouge-score."""

from __future__ import annotations

import functools
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", "exact_match", "pearson", "spearman", "r2")
CORRELATIONS = ("pearson", "spearman")
OF_NUMBERS = (*CORRELATIONS, "r2")
"""Metrics of a regression. R² notices numbers that are all too large or too far apart, a correlation does not."""
TEXT_METRICS = ("rouge_l", "rouge_1", "rouge_2", "exact_match")
"""Metrics of free-text answers: F-measures of ROUGE, and the share of answers that equal the reference."""
UNPARSABLE = -1
"""The prediction for generated text that is not one of the task's labels."""
UNPARSABLE_VALUE = -1.0  # its number in a regression, as in ATTEMPT's evaluation


def compute_metrics(
    names: Sequence[str],
    predictions: Sequence[int],
    references: Sequence[int],
    num_labels: int,
    *,
    values: Sequence[float] = (),
    numbers: tuple[Sequence[float], Sequence[float]] | None = None,
    groups: Sequence[int] | None = None,
) -> dict[str, float]:
    """Scores `predictions` against `references`, both class indices in `0 .. num_labels-1`, by each named metric.

    A prediction of -1 is unparsable and always counts as wrong. For `accuracy` and `exact_match` that is all. `f1` (of
    the second class) and `matthews_correlation` replace it by a wrong class, the one after the right one (with two
    classes the other one, as in ATTEMPT's evaluation). `f1_macro`, like scikit-learn's, is the mean over the classes
    that occur in references or predictions, and counts it as a miss of the right class and a prediction of none. For
    `pearson`, `spearman` and `r2` it is the number -1.

    Args:
        values: for a regression, the number that each class stands for.
        numbers: for a regression, the predicted and the right numbers, if known more exactly than by class.
        groups: for `exact_match`, which rows belong together; None: every row stands alone.

    Returns `{name: value}`: 0..1 for accuracy, F1 and exact match (the share of groups without a mistake), -1..1 for
    the correlations, at most 1 for R² (the coefficient of determination), 0 where they are undefined. Raises
    ValueError for an unknown metric or one that does not fit the labels, unequal lengths, nothing to score, or an index
    outside the range.
    """
    check_metrics(names, num_labels, is_regression=bool(values))
    groups = range(len(references)) if groups is None else groups
    if not len(predictions) == len(references) == len(groups):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references in {len(groups)} groups: "
            "give one for each"
        )
    if not len(references):
        raise ValueError("0 predictions: there is nothing to score, give at least one")
    for what, classes, low in (("reference", references, 0), ("prediction", predictions, UNPARSABLE)):
        for position, index in enumerate(classes):
            if not low <= index < num_labels:
                raise ValueError(
                    f"{what} {position} is {index}, outside {low} .. {num_labels - 1} for {num_labels} labels: "
                    "map it to a label's index first"
                )

    from scipy import stats  # here: both take a second to import, and the table of tasks needs neither
    from sklearn import metrics

    pairs = list(zip(predictions, references))
    as_wrong_class = [(right + 1) % num_labels if found == UNPARSABLE else found for found, right in pairs]
    scores: dict[str, float] = {}
    for name in names:
        if name == "accuracy":
            score = metrics.accuracy_score(references, predictions)
        elif name == "f1":
            score = metrics.f1_score(references, as_wrong_class, labels=[0, 1], average="binary", zero_division=0.0)
        elif name == "f1_macro":
            labels = sorted({*references, *predictions} - {UNPARSABLE})
            score = metrics.f1_score(references, predictions, labels=labels, average="macro", zero_division=0.0)
        elif name == "matthews_correlation":
            score = metrics.matthews_corrcoef(references, as_wrong_class)
        elif name == "exact_match":
            mistaken = {group for group, (found, right) in zip(groups, pairs) if found != right}
            score = (len(set(groups)) - len(mistaken)) / len(set(groups))
        else:
            found_ones, right_ones = numbers or (
                [UNPARSABLE_VALUE if found == UNPARSABLE else values[found] for found in predictions],
                [values[right] for right in references],
            )
            score = 0.0  # a model that always gives the same answer has learned nothing
            if name == "r2" and len(set(right_ones)) > 1 and all(map(math.isfinite, found_ones)):
                score = metrics.r2_score(right_ones, found_ones)
            elif name != "r2" and len(set(found_ones)) > 1 and len(set(right_ones)) > 1:
                correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
                score = correlate(found_ones, right_ones).statistic
        scores[name] = 0.0 if math.isnan(score) else float(score)
    return scores


def compute_text_metrics(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Scores free-text answers by each named metric, `{name: mean over the rows}`, all 0..1.

    ROUGE is rouge-score's, without stemming, over words of any script; raises ValueError without that package.
    `exact_match` ignores white space and how Unicode composes a letter with its marks.
    """
    scores: dict[str, float] = {}
    predictions, references = ([unicodedata.normalize("NFC", text) for text in of] for of in (predictions, references))
    if any(name.startswith("rouge") for name in names):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            remedy = "pip install rouge-score, or set data.metric=[exact_match]"
            raise ValueError(f"the metric rouge_l needs the package rouge-score: {remedy}") from error
        scorer = RougeScorer(["rougeL", "rouge1", "rouge2"], tokenizer=_Words())
        rows = [scorer.score(reference, found) for found, reference in zip(predictions, references)]
        for kind in ("L", "1", "2"):
            scores[f"rouge_{kind.lower()}"] = sum(row[f"rouge{kind}"].fmeasure for row in rows) / len(rows)
    same = [" ".join(found.split()) == " ".join(right.split()) for found, right in zip(predictions, references)]
    scores["exact_match"] = sum(same) / len(same)
    return {name: scores[name] for name in names}


@functools.cache  # finding the marks among all Unicode characters takes a quarter of a second
class _Words:
    """Tokenizer into lower-case words of any script, which keep their marks (vowel signs, accents).

    In scripts without spaces between words, each letter is a word.
    """

    UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    """Thai and Lao, Burmese, Khmer, kana, Chinese characters."""

    def __init__(self) -> None:
        signs = map(chr, range(sys.maxunicode + 1))
        marks = "".join(sign for sign in signs if unicodedata.category(sign) in ("Mn", "Mc"))  # `\w` leaves them out
        letter = rf"\w[{marks}]*"
        self._word = re.compile(rf"(?={self.UNSPACED}){letter}|(?:(?!{self.UNSPACED}){letter})+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(unicodedata.normalize("NFC", text.casefold()))


def metric_name(metric: str, labels: Sequence[str]) -> str:
    """Returns a metric's name for people: `f1` with its positive label, the second."""
    return f"f1 of {labels[1]!r}" if metric == "f1" and len(labels) == 2 else metric


def check_metrics(names: Sequence[str], num_labels: int, is_regression: bool = False, is_text: bool = False) -> None:
    """Raises ValueError if `names` do not fit a task with this many labels, a regression or free-text answers."""
    if not names:
        raise ValueError(f"0 metrics given: name at least one of {', '.join(METRICS)}")
    for name in names if is_text else ():
        if name not in TEXT_METRICS:
            raise ValueError(f"metric '{name}' is not for free text: name some of {', '.join(TEXT_METRICS)}")
    for name in names if not is_text else ():
        if name not in METRICS:
            close = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown metric '{name}': did you mean '{close}'? Known: {', '.join(METRICS)}")
        if name == "f1" and num_labels != 2:
            raise ValueError(f"metric 'f1' is for 2 labels, but the task has {num_labels}: use 'f1_macro'")
        if name in OF_NUMBERS and not is_regression:
            raise ValueError(
                f"metric '{name}' is for a regression, but the task has {num_labels} labels: use 'accuracy'"
            )
