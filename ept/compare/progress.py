"""Learning curves of a comparison: the number of steps that each method needs, by validation scores."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.folder import MetricsLog, RunFolder
from ..runs.method_table import METHODS

if TYPE_CHECKING:
    from .tables import MethodSummary

BASELINE = "pt"
"""The method whose last score the steps of all methods, itself included, are counted to."""
NEARLY = 0.95
"""Share of a method's last score that counts as nearly there."""

Curve = Mapping[int, float]
"""Validation score by step."""


def curve_of(folder: Path, metric: str) -> Curve:
    """Reads a finished run's validation scores from its log."""
    events = MetricsLog(RunFolder(folder).metrics).read()
    return {event["step"]: event[f"eval_{metric}"] for event in events if event.get(f"eval_{metric}") is not None}


def mean_curve(by_task: Mapping[str, Sequence[Curve]]) -> Curve:
    """Averages over the runs of each task, then over the tasks, at the steps at which all runs were scored."""
    runs = list(itertools.chain.from_iterable(by_task.values()))
    steps = sorted(set.intersection(*(set(curve) for curve in runs))) if runs else []
    return {
        step: statistics.fmean(statistics.fmean(curve[step] for curve in found) for found in by_task.values())
        for step in steps
    }


def steps_to(curve: Curve, score: float) -> float | None:
    """Finds the step at which a curve, linear between its evaluations, first reaches a score; None if never."""
    points = sorted(curve.items())
    if points and points[0][1] >= score:
        return float(points[0][0])
    for (start, low), (end, high) in itertools.pairwise(points):
        if high >= score:
            return start + (end - start) * (score - low) / (high - low)
    return None


def steps_table(methods: Sequence[MethodSummary]) -> tuple[list[str], list[list[str]]] | None:
    """Returns header and rows of the table of steps; None if no method was scored more than once."""
    curves = {m.method: m.curve for m in methods if len(m.curve) > 1}
    if not curves:
        return None
    baseline = curves.get(BASELINE)
    # Curves are not monotonic: the baseline too may have reached its last score before the end.
    its_steps = steps_to(baseline, baseline[max(baseline)]) if baseline else None

    def cell(curve: Curve, steps: float | None) -> str:
        if steps is None:
            return "not reached"
        return f"{'≤ ' if steps == min(curve) else ''}{steps:,.0f}"  # nothing is known before the first evaluation

    header = ["method", "steps", "validation at the end", f"steps to {NEARLY:.0%} of it"]
    header += [f"steps to {METHODS[BASELINE].title}'s end", "share of its steps"] if baseline else []
    rows = []
    for name, curve in curves.items():
        last = max(curve)
        row = [
            METHODS[name].title,
            f"{last:,}",
            f"{100 * curve[last]:.1f}",
            # For a negative score, a share of it would be higher.
            cell(curve, steps_to(curve, NEARLY * curve[last])) if curve[last] > 0 else "-",
        ]
        if baseline:
            steps = steps_to(curve, baseline[max(baseline)])
            row += [cell(curve, steps), "-" if steps is None or not its_steps else f"{steps / its_steps:.2f}"]
        rows.append(row)
    return header, rows
