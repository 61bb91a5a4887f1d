"""What a score does not show: constant answers, chance, single labels, probabilities that mean nothing."""

import math
import random
import statistics

import pytest

from ept.runs import report
from ept.runs.evaluation import Answer, Evaluation, standard_error
from ept.tasks import compute_metrics

LABELS = ("no", "yes")


def evaluation(answers, references, p=0.9, metric="accuracy", labels=LABELS):
    found = [a if isinstance(a, Answer) else Answer(a, (p, 1 - p) if a == 0 else (1 - p, p)) for a in answers]
    metrics = compute_metrics([metric], [a.label for a in found], references, len(labels))
    unparsable = sum(a.label < 0 for a in found) / len(found)
    return Evaluation({**metrics, "unparsable": unparsable}, found, references, labels)


def test_one_answer_to_all_rows_is_named():
    found = evaluation([0] * 100, [0] * 70 + [1] * 30)
    assert found.verdict(0.7) == "answers 'no' to 100% of the rows"
    assert (found.is_constant, found.shares) == (True, {"no": 1.0})
    assert evaluation([Answer(-1)] * 10, [0, 1] * 5).constancy() == "answers '(no label)' to 100% of the rows"
    assert evaluation([0] * 99 + [1], [0] * 99 + [1]).is_constant  # a share as good as all
    assert not evaluation([0] * 9, [0] * 9).is_constant  # there is nothing else to answer
    assert not evaluation([0] * 98 + [1] * 2, [0, 1] * 50).is_constant


@pytest.mark.parametrize("spread, is_constant", [(1.0, False), (0.06, False), (0.03, True), (0.0, True)])
def test_numbers_that_hardly_differ_are_one_answer(spread, is_constant):
    right = [240_000.0, 1e6, *[250_000.0 + 100 * i for i in range(50)]]  # all but one nearest to the same label
    middle = statistics.fmean(right)
    answers = [Answer(0, number=middle + spread * (number - middle)) for number in right]
    found = Evaluation({"pearson": 0.5}, answers, [0] * len(right), LABELS, True, right)
    assert found.constancy() == ("answers about 266,587 to all rows" if is_constant else None)
    assert found.is_constant == is_constant


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_none_are_no_label(broken):
    right, found = [1.0, 2.0, 3.0], [Answer(-1, number=broken)] * 3
    assert Evaluation({"pearson": 0.0}, found, [0, 1, 1], LABELS, True, right).constancy() == (
        "answers '(no label)' to 100% of the rows"
    )
    for numbers in ([broken] * 3, [1.0, 2.0, broken]):
        names = ["pearson", "r2"]
        scores = compute_metrics(names, [-1] * 3, [0, 1, 1], 2, values=(0.0, 1.0), numbers=(numbers, right))
        assert scores == {"pearson": 0.0, "r2": 0.0}


@pytest.mark.parametrize("right, worthless", [(310, True), (318, True), (340, False)])
def test_a_score_within_chance_of_the_majority_is_worthless(right, worthless):
    """Two standard errors are 4.3 points, on 500 rows with 60 % of one label."""
    references = [0] * 300 + [1] * 200
    answers = [*references[:right], *(1 - r for r in references[right:])]
    random.Random(0).shuffle(pairs := list(zip(answers, references)))
    found = evaluation(*map(list, zip(*pairs))).verdict(0.6)
    assert (found is not None) == worthless
    if worthless:
        assert found == (
            f"scores accuracy {right / 500:.3f}, which is not above that of always giving the commonest label, 0.600, "
            "by more than chance (0.043 on 500 rows)"
        )


def test_f1_names_its_positive_label():
    found = evaluation([0, 1] * 50, [1] * 70 + [0] * 30, metric="f1")
    assert "scores f1 of 'yes' 0.583, which is not above" in found.verdict(0.8)
    results = {"metric": "f1", "by_label": found.by_label(), "score": 0.58, "score_before": 0.1, "majority": 0.8}
    numbers = {"test_metrics": {"f1": 0.58, "accuracy": 0.5}, "rows": {"test": 100}, "steps": 1, "best_step": 1}
    sizes = {"trainable_parameters": 1, "stored_parameters": 1, "peak_memory_bytes": 1, "peak_memory_kind": "ram"}
    times = {"train_seconds": 1.0, "step_time_ms": None, "truncation_rate": {"train": 0, "test": 0}}
    shown = [name for name, _ in report._properties({**results, **numbers, **sizes, **times})]
    assert shown[:4] == ["f1 of 'yes' before training", "f1 of 'yes' after training", "commonest answer", "accuracy"]


def test_shuffled_labels_are_no_better_than_the_majority():
    chance = random.Random(1)
    worthless = 0
    for _ in range(100):
        references = [int(chance.random() < 0.4) for _ in range(400)]
        answers = [int(chance.random() < 0.4) for _ in range(400)]  # of the same shares, and nothing to do with them
        worthless += (
            evaluation(answers, references).verdict(max(references.count(0), references.count(1)) / 400) is not None
        )
    assert worthless == 100


def test_errors_of_correlations_and_of_r2():
    assert standard_error("matthews_correlation", 0.0, 400) == 0.05
    assert standard_error("r2", 0.0, 400) == standard_error("r2", -3.0, 400) == 0.05
    assert standard_error("r2", 0.25, 400) == pytest.approx(2 * 0.5 * 0.75 / 20)
    assert evaluation([0, 1] * 50, [0, 1] * 50, metric="matthews_correlation").verdict(0.0) is None


def test_labels_one_by_one():
    found = evaluation([0, 0, 1, Answer(-1)], [0, 1, 1, 0])
    assert found.by_label() == {
        "no": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2},
        "yes": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2},
    }
    assert found.confusion() == (["no", "yes", "(no label)"], [[1, 0, 1], [1, 1, 0]])
    assert evaluation([0, 1], [0, 1]).confusion() == (["no", "yes"], [[1, 0], [0, 1]])


def test_confident_mistakes_come_first():
    answers = [Answer(0, (p, 1 - p)) for p in (0.6, 0.9, 0.99, 0.7)]
    assert evaluation(answers, [1, 1, 0, 1]).confident_mistakes(2) == [1, 3]
    assert evaluation([Answer(0)], [1]).confident_mistakes() == []


def test_calibration_error():
    assert evaluation([0] * 10, [0] * 9 + [1], p=0.9).calibration_error() == pytest.approx(0.0)
    assert evaluation([0] * 10, [0] * 5 + [1] * 5, p=0.9).calibration_error() == pytest.approx(0.4)
    mixed = [Answer(0, (0.95, 0.05))] * 4 + [Answer(1, (0.45, 0.55))] * 6
    assert evaluation(mixed, [0, 0, 0, 1] + [1] * 6).calibration_error() == pytest.approx(0.4 * 0.2 + 0.6 * 0.45)
    assert evaluation([Answer(0)], [0]).calibration_error() is None
    assert not math.isnan(evaluation([Answer(0, (1.0, 0.0))], [0]).calibration_error())
