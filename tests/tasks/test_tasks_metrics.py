"""compute_metrics against numbers worked out by hand."""

import pytest

from ept.tasks import compute_metrics

# name, predictions, references, number of labels, value
HAND_COMPUTED = [
    ("accuracy", [0, 1, 1, 0], [0, 1, 0, 0], 2, 3 / 4),
    ("accuracy", [-1, 1], [0, 1], 2, 1 / 2),
    ("accuracy", [-1, -1], [0, 1], 2, 0.0),
    # true positives 2, false positives 1, false negatives 1: precision = recall = 2/3
    ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2, 2 / 3),
    ("f1", [0, 0], [0, 0], 2, 0.0),
    # unparsable becomes the other class: a false positive and a false negative, as one row above
    ("f1", [1, 1, -1, -1, 0], [1, 1, 0, 1, 0], 2, 2 / 3),
    ("f1", [-1, 1], [1, 1], 2, 2 / 3),
    # class 0: precision 1/2, recall 1; class 1: 1, 1/2; class 2: 1, 1 -> F1 2/3, 2/3, 1
    ("f1_macro", [0, 0, 1, 2], [0, 1, 1, 2], 3, (2 / 3 + 2 / 3 + 1) / 3),
    # a class that occurs nowhere has no part in the mean, one that is answered alone has
    ("f1_macro", [0, 1], [0, 1], 3, 1.0),
    ("f1_macro", [0, 1, 2], [0, 1, 1], 4, (1 + 2 / 3 + 0) / 3),
    ("f1_macro", [-1, 0], [0, 0], 3, 2 / 3),
    ("f1_macro", [-1], [2], 3, 0.0),
    # unparsable: recall of class 1 falls to 1/2, no other class loses precision
    ("f1_macro", [0, -1, 1, 2], [0, 1, 1, 2], 3, (1 + 2 / 3 + 1) / 3),
    # (TP·TN - FP·FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2·1 - 1·1) / sqrt(3·3·2·2)
    ("matthews_correlation", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2, 1 / 6),
    ("matthews_correlation", [1, 1, -1, -1, 0], [1, 1, 0, 1, 0], 2, 1 / 6),
    ("matthews_correlation", [-1, -1], [0, 1], 2, -1.0),
    ("matthews_correlation", [1, 1, 1], [1, 0, 1], 2, 0.0),
    # class indices of STS-B's grid
    ("pearson", [0, 10, 25], [0, 10, 25], 26, 1.0),
    ("pearson", [25, 15, 0], [0, 10, 25], 26, -1.0),
    # x = 1, 2, 3; y = 1, 3, 2: covariance 1/3 over variance 2/3
    ("pearson", [5, 10, 15], [5, 15, 10], 26, 0.5),
    # unparsable is the number -1, below every score: x = -1, 2, 3; y = 1, 2, 3: covariance sum 4, squares 26/3 and 2
    ("pearson", [-1, 10, 15], [5, 10, 15], 26, 4 / (26 / 3 * 2) ** 0.5),
    ("pearson", [7, 7, 7], [5, 10, 15], 26, 0.0),  # undefined
    ("pearson", [5, 10, 15], [7, 7, 7], 26, 0.0),
    # ranks 1, 2, 3 against 1, 3, 2: 1 - 6·2 / (3·8)
    ("spearman", [1, 2, 25], [3, 20, 19], 26, 0.5),
    ("spearman", [-1, 2, 25], [3, 19, 20], 26, 1.0),
    # 1, 3, 2 for 1, 2, 3: the squares of the errors add up to 2, those of the distances from the mean too
    ("r2", [5, 15, 10], [5, 10, 15], 26, 0.0),
    ("r2", [5, 10, 15], [5, 10, 15], 26, 1.0),
    ("r2", [10, 15, 20], [5, 10, 15], 26, -0.5),  # all of them 1 too large, which a correlation does not notice
    ("r2", [10, 10, 10], [5, 10, 15], 26, 0.0),
    ("r2", [-1, 10, 15], [5, 10, 15], 26, -1.0),
    ("r2", [5, 10, 15], [7, 7, 7], 26, 0.0),  # undefined
]


@pytest.mark.parametrize("name, predictions, references, num_labels, value", HAND_COMPUTED)
def test_value(name, predictions, references, num_labels, value):
    values = [i / 5 for i in range(26)] if num_labels == 26 else ()
    found = compute_metrics([name], predictions, references, num_labels, values=values)
    assert found == {name: pytest.approx(value, abs=1e-12)}


def test_exact_match_counts_groups_without_a_mistake():
    predictions, references = [0, 1, 1, -1, 0], [0, 1, 0, 1, 0]
    groups = [7, 7, 8, 9, 8]
    assert compute_metrics(["exact_match"], predictions, references, 2, groups=groups) == {"exact_match": 1 / 3}
    assert compute_metrics(["exact_match"], predictions, references, 2) == {"exact_match": 3 / 5}


def test_several_metrics_keep_their_order():
    scores = compute_metrics(("f1_macro", "accuracy"), [0, 1, 2], [0, 1, 2], 3)
    assert list(scores.items()) == [("f1_macro", 1.0), ("accuracy", 1.0)]
    assert all(type(score) is float for score in scores.values())


BAD = [
    (["acuracy"], [0], [0], 2, "unknown metric 'acuracy': did you mean 'accuracy'"),
    ([], [0], [0], 2, "0 metrics given"),
    (["f1"], [0], [0], 3, "'f1' is for 2 labels, but the task has 3: use 'f1_macro'"),
    (["pearson"], [0], [0], 2, "'pearson' is for a regression, but the task has 2 labels: use 'accuracy'"),
    (["accuracy"], [0, 1], [0], 2, "2 predictions for 1 references"),
    (["accuracy"], [], [], 2, "nothing to score"),
    (["accuracy"], [0, 2], [0, 1], 2, r"prediction 1 is 2, outside -1 \.\. 1"),
    (["accuracy"], [0, 1], [0, -1], 2, r"reference 1 is -1, outside 0 \.\. 1"),
]


@pytest.mark.parametrize("names, predictions, references, num_labels, message", BAD)
def test_refused(names, predictions, references, num_labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(names, predictions, references, num_labels)
