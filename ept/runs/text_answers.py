"""Free-text answers on a split: their scores, and whether they depend on the texts at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .evaluation import one_answer

MAX_SAMPLES = 10


@dataclass(frozen=True)
class TextEvaluation:
    """The written answers to the rows of a split, with the true ones; corresponds to `Evaluation` for labels.

    `metrics` has the task's metrics, the first of which decides, and the `loss` of the true answers in nats per token.
    """

    metrics: dict[str, float]
    texts: Sequence[str]
    references: Sequence[str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of each text among the answers, the commonest first."""
        return {text: count / len(self.texts) for text, count in Counter(self.texts).most_common()}

    @property
    def is_constant(self) -> bool:
        return self.constancy() is not None

    def constancy(self) -> str | None:
        """Describes a model that gives one answer whatever the text; None if it does not."""
        return one_answer(self.shares, self.references)

    def verdict(self, majority: float) -> str | None:
        """Says why the score is worthless, if it is: constant answers, or no better than the commonest answer."""
        name, score = next(iter(self.metrics.items()))
        if (text := self.constancy()) is not None or score > majority:
            return text
        usual = f"always giving the commonest answer, {majority:.3f}"
        return f"scores {name} {score:.3f}, which is not above that of {usual}"

    def samples(self) -> list[tuple[str, str]]:
        """Returns the first reference answers, each with the model's own."""
        return list(zip(self.references, self.texts))[:MAX_SAMPLES]

    def summary(self) -> dict[str, Any]:
        """Returns what `results.json` holds in addition to the metrics."""
        return {"constant": self.is_constant, "samples": self.samples()}
