"""The report on a run: what is going to be trained, its learning curve and a table of its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..utils.messages import listed
from ..utils.plots import plot
from ..utils.tables import properties
from .data import describe
from .method_table import METHODS

if TYPE_CHECKING:
    from .train import PreparedRun


def run_summary(run: PreparedRun) -> dict[str, Any]:
    """Describes what is going to be trained: data, labels, texts, method and parameters."""
    config, task = run.config, run.task
    adapter = run.model.active_peft_config.to_dict()
    return {
        "model": config.model.name_or_path,
        "task": task.name,
        "task_type": run.task_type,
        "kind": "regression" if task.values else "classification",
        "text_columns": list(task.columns),
        "label_column": task.label_column,
        "template": task.template,
        "labels": list(run.labels),
        "metric": task.metrics[0],
        "metrics": list(task.metrics),
        **describe(run.run_data.data),
        "max_length": run.max_length,
        "truncation_rate": run.run_data.truncation_rate,
        "method": config.method.name,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "adapter": {key: value for key, value in adapter.items() if value is not None},
        "output_dir": config.output_dir,
    }


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """Makes a table of what `run_summary` describes."""
    labels = f"{summary['labels'][0]} .. {summary['labels'][-1]}, rounded to the nearest of {len(summary['labels'])}"
    if summary["kind"] == "classification":
        labels = f"{len(summary['labels'])}: {listed(map(repr, summary['labels']))}"
    rows = [
        ("model", f"{summary['model']} ({summary['task_type']})"),
        ("text", f"{listed(summary['text_columns'])}, as {summary['template']!r}"),
        ("label", f"{summary['label_column']}, {summary['kind']}"),
        ("labels", labels),
        ("metric", listed(summary["metrics"]) + (", the first decides" if len(summary["metrics"]) > 1 else "")),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items())),
        *(("left out", f"{count:,} rows with {why}") for why, count in summary["left_out"].items()),
        ("label balance", _shares(summary["label_balance"])),
        ("majority class", f"{summary['metric']} {summary['majority']:.4f}"),
        (f"texts cut to {summary['max_length']} tokens", _shares(summary["truncation_rate"])),
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        *([("folder", summary["output_dir"])] if summary["output_dir"] is not None else []),
    ]
    return properties(rows, f"{title}: {summary['method']} on {summary['task']}")


def _shares(values: Mapping[str, float]) -> str:
    return listed(f"{name} {share:.1%}" for name, share in values.items())


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
