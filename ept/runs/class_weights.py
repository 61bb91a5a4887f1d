"""Class weights: each row's loss is weighted by the inverse share of its label, with mean 1 over the train rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..tasks.encoding import IGNORE

if TYPE_CHECKING:
    from ..tasks import Task


def row_weights(labels: Sequence[int]) -> list[float]:
    """Weights every row by N / (labels · rows of its label), so that every label has the same total weight."""
    counts = Counter(labels)
    return [len(labels) / (len(counts) * counts[label]) for label in labels]


def check_has_classes(task: Task) -> None:
    """Raises ValueError for a regression and for free-text answers, which have no classes to weight."""
    if task.values or task.is_text:
        kind = "numbers" if task.values else "free text"
        raise ValueError(f"training.class_weights weights labels, but the answers here are {kind}: leave it out")


def added_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, num_items: Tensor | int | None, shifted: bool
) -> Tensor:
    """Computes what row weights add to the loss of a batch: Σ (weight − 1)·loss / number, over its labels.

    Added to the model's own loss, it keeps other terms of that loss, such as a router's, as they are.

    Args:
        logits: `[B, labels]`, or `[B, n, vocabulary]` of a decoder with `shifted`. If logits and labels differ in
            length, the last columns of both are aligned.
        labels: `[B]` or `[B, m]`, −100 for none.
        weights: `[B]`.
        num_items: labels to divide by, over all accumulated batches; None: those of this batch.
    """
    if shifted:
        kept = min(logits.shape[1], labels.shape[1])
        logits, labels = logits[:, -kept:][:, :-1], labels[:, -kept:][:, 1:]
    losses = cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    extra = (weights - 1).to(losses).unsqueeze(-1) * losses.view(len(labels), -1)
    return extra.sum() / (labels.ne(IGNORE).sum() if num_items is None else num_items)
