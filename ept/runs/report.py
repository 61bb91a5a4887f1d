"""The report on a run: its learning curve and a table of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..utils.plots import plot
from ..utils.tables import properties
from .method_table import METHODS


def learning_curve(results: dict[str, Any], events: list[dict[str, Any]], file: Path) -> None:
    """Draws training loss and validation score over the steps into a PNG, from the results and the log of a run.

    The score of always answering the commonest label is a line, the scores on the test split are stars.
    """
    from matplotlib.ticker import MaxNLocator

    metric, best_step = results["metric"], results["best_step"] or results["steps"]
    title = f"{METHODS[results['method']].title} on {results['task']}: {results['trainable_parameters']:,} parameters"
    test = [(step, results[key]) for step, key in ((0, "score_before"), (best_step, "score"))]
    test = [(step, score) for step, score in test if score is not None]
    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    scores = [(event["step"], event[f"eval_{metric}"]) for event in events if f"eval_{metric}" in event]
    best = max((score for _, score in scores), default=float("nan"))
    with plot(file, title, panels=2, height=6.0) as (upper, lower):
        upper.plot(*np.reshape(losses, (-1, 2)).T, color="tab:blue", marker="." if len(losses) < 50 else None)
        upper.set_ylabel("training loss (nats)")
        lower.plot(
            *np.reshape(scores, (-1, 2)).T,
            color="tab:green",
            marker="o",
            label=f"{metric} on validation, best {best:.3f}",
        )
        label = f"majority class on test {results['majority']:.3f}"
        lower.axhline(results["majority"], color="tab:gray", linestyle="--", label=label)
        label = "on test, before and after" if len(test) > 1 else "on test"
        lower.scatter(*zip(*test), color="tab:red", marker="*", s=120, zorder=3, label=label)
        lower.set_ylabel(f"{metric} (fraction)" if metric != "matthews_correlation" else "Matthews correlation (-1..1)")
        lower.set_xlabel("optimiser step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.margins(y=0.15)


def results_table(results: dict[str, Any]) -> Table:
    """Makes a table of a run's results."""
    metric = results["metric"]
    rows = []
    if results["score_before"] is not None:
        rows.append((f"{metric} before training", f"{results['score_before']:.4f}"))
    rows += [(f"{metric} after training", f"{results['score']:.4f}"), ("majority class", f"{results['majority']:.4f}")]
    for name, value in results["test_metrics"].items():
        if name != metric and (name != "unparsable" or value > 0):
            rows.append((name, f"{value:.4f}"))
    rows += [
        ("test rows", f"{results['rows']['test']:,}"),
        ("parameters, trained / stored", f"{results['trainable_parameters']:,} / {results['stored_parameters']:,}"),
        ("steps (best at)", f"{results['steps']} ({results['best_step']})"),
        ("training time", f"{results['train_seconds']:.1f} s"),
    ]
    if results["step_time_ms"] is not None:
        rows.append(("median step", f"{results['step_time_ms']:.1f} ms"))
    memory = f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"
    rows.append((f"peak memory ({results['peak_memory_kind']})", memory))
    return properties(rows, f"{results['method']} on {results['task']}", left=1)
