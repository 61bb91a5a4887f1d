"""The report on a run: a table in the terminal, and `report.md` with its figures."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..tasks import TaskData
from ..tasks.metrics import CORRELATIONS, metric_name
from ..tasks.rows import ROW
from ..utils.files import write_atomically
from ..utils.plots import name_ticks, plot
from ..utils.tables import markdown, properties, table
from .evaluation import Evaluation
from .folder import RunFolder
from .method_table import METHODS
from .text_answers import TextEvaluation

MAX_MATRIX = 30  # labels up to which a confusion matrix is readable
_RANGES = {**dict.fromkeys((*CORRELATIONS, "matthews_correlation"), "-1..1"), "r2": "at most 1"}  # 0..1 for the others


def write_report(
    results: dict[str, Any],
    evaluation: Evaluation | TextEvaluation,
    data: TaskData,
    events: list[dict[str, Any]],
    folder: RunFolder,
) -> None:
    """Writes `report.md`, the learning curve and, for a classification, the confusion matrix into a run's folder.

    Args:
        results: content of `results.json`.
        evaluation: the answers on the test split of `data`.
        events: the run's log.
    """
    learning_curve(results, events, folder.curve)
    figures = [folder.curve]
    if isinstance(evaluation, Evaluation) and not evaluation.is_regression and len(evaluation.labels) <= MAX_MATRIX:
        confusion_matrix(results, evaluation, folder.confusion)
        figures.append(folder.confusion)
    parts = [f"# {METHODS[results['method']].title} on {results['task']}"]
    if results["verdict"]:
        parts.append(f"**On test the model {results['verdict']}.**")
    parts.append(markdown(("", "value"), _properties(results)))
    if "by_label" in results:
        parts += ["## By label", markdown(*_by_label(results))]
    parts += [f"![{figure.stem.replace('_', ' ')}]({figure.name})" for figure in figures]
    numbers = f"Rows are numbered as in the {data.sources['test'][0]} data, from 1."
    if isinstance(evaluation, TextEvaluation):
        pairs = zip(data.test[ROW], evaluation.samples())
        written = [[str(number), *map(_shortened, pair)] for number, pair in pairs]
        parts += ["## What the model writes", markdown(["row", "right answer", "the model's"], written), numbers]
    elif mistakes := evaluation.confident_mistakes():
        rows = [data.test[place] for place in mistakes]
        parts += ["## Most confident mistakes", markdown(*_mistakes(evaluation, mistakes, rows)), numbers]
    name = shlex.quote(folder.path.name)
    commands = [f"ept predict {name} 'a text'", f"ept evaluate {name}", f"ept export {name} --output exported"]
    parts += ["## What next", "In the folder above this one:", "```sh\n" + "\n".join(commands) + "\n```"]
    parts.append(
        "To share the adapter, give away the folder `adapter`: `EPTModel.from_pretrained(base_model, folder)` loads it "
        "and `push_to_hub` of the loaded model uploads it."
    )
    write_atomically(folder.report, "\n\n".join(parts) + "\n")


def learning_curve(results: dict[str, Any], events: list[dict[str, Any]], file: Path) -> None:
    """Plots training loss and validation score over the steps as a PNG, from the results and log of a run.

    A line shows the score of always answering the commonest label, stars the scores on the test split. If the scores
    are worthless, the title says why.
    """
    from matplotlib.ticker import MaxNLocator

    metric, best_step = results["metric"], results["best_step"] or results["steps"]
    title = f"{METHODS[results['method']].title} on {results['task']}: {results['trainable_parameters']:,} parameters"
    if results["verdict"]:
        title += f". On test the model {results['verdict']}"
    test = [(step, results[key]) for step, key in ((0, "score_before"), (best_step, "score"))]
    test = [(step, score) for step, score in test if score is not None and math.isfinite(score)]
    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    scores = [(event["step"], event[name]) for event in events if event.get(name := f"eval_{metric}") is not None]
    best = max((score for _, score in scores), default=float("nan"))
    with plot(file, title, panels=2, height=6.0) as (upper, lower):
        upper.plot(*np.reshape(losses, (-1, 2)).T, color="tab:blue", marker="." if len(losses) < 50 else None)
        upper.set_ylabel("training loss (nats)")
        lower.plot(
            *np.reshape(scores, (-1, 2)).T,
            color="tab:green",
            marker="o",
            label=f"{_named(results, metric)} on validation, best {best:.3f}",
        )
        label = f"commonest answer on test {results['majority']:.3f}"
        lower.axhline(results["majority"], color="tab:gray", linestyle="--", label=label)
        label = "on test, before and after" if len(test) > 1 else "on test"
        lower.scatter(*np.reshape(test, (-1, 2)).T, color="tab:red", marker="*", s=120, zorder=3, label=label)
        lower.set_ylabel(f"{_named(results, metric)} ({_RANGES.get(metric, 'fraction')})")
        lower.set_xlabel("optimiser step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.margins(y=0.15)


def confusion_matrix(results: dict[str, Any], evaluation: Evaluation, file: Path) -> None:
    """Plots as a PNG how often each label was answered for the rows of each label, with the counts."""
    columns, counts = evaluation.confusion()
    rows = list(evaluation.labels)
    shares = np.array(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    size = max(4.2, 1.5 + 0.6 * len(rows))
    title = f"{METHODS[results['method']].title} on {results['task']}: answers on test"
    with plot(file, title, width=size + 1, height=size, grid=False) as (axes,):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        name_ticks(axes.xaxis, columns)
        name_ticks(axes.yaxis, rows)
        axes.set_xlabel("answer")
        axes.set_ylabel("label")
        for row, column in np.ndindex(shares.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row][column]:,}", ha="center", va="center", color=colour)


def results_tables(results: dict[str, Any]) -> list[Table | Text]:
    """Makes the tables of a run's results for the terminal."""
    shown: list[Table | Text] = [properties(_properties(results), f"{results['method']} on {results['task']}", left=1)]
    if "by_label" in results and len(results["by_label"]) <= MAX_MATRIX:
        shown.append(table(*_by_label(results)))
    if results["verdict"]:
        shown.append(Text(f"On test the model {results['verdict']}.", "bold red"))
    return shown


def _properties(results: dict[str, Any]) -> list[tuple[str, str]]:
    metric, shown = results["metric"], _named(results, results["metric"])
    rows = []
    if results["score_before"] is not None:
        rows.append((f"{shown} before training", f"{results['score_before']:.4f}"))
    rows += [(f"{shown} after training", f"{results['score']:.4f}"), ("commonest answer", f"{results['majority']:.4f}")]
    for name, value in results["test_metrics"].items():
        if name != metric and (name != "unparsable" or value > 0):
            rows.append((_named(results, name), f"{value:.4f}"))
    if (error := results.get("calibration_error")) is not None:
        rows.append(("expected calibration error", f"{error:.4f}"))
    rows += [
        ("test rows", f"{results['rows']['test']:,}"),
        *(
            (f"{what} cut, train / test", " / ".join(f"{results[key][name]:.1%}" for name in ("train", "test")))
            for what, key in (("texts", "truncation_rate"), ("answers", "cut_answers"))
            if key in results
        ),
        ("parameters, trained / stored", f"{results['trainable_parameters']:,} / {results['stored_parameters']:,}"),
        ("steps (best at)", f"{results['steps']} ({results['best_step']})"),
        ("training time", f"{results['train_seconds']:.1f} s"),
    ]
    if results["step_time_ms"] is not None:
        rows.append(("median step", f"{results['step_time_ms']:.1f} ms"))
    memory = f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"
    return [*rows, (f"peak memory ({results['peak_memory_kind']})", memory)]


def _named(results: dict[str, Any], metric: str) -> str:
    return metric_name(metric, list(results.get("by_label", ())))


def _by_label(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["label", "rows", "answered", "precision", "recall", "F1"]
    rows = [
        [
            name,
            f"{found['rows']:,.0f}",
            f"{results['answers'].get(name, 0.0):.1%}",
            *(f"{found[key]:.3f}" for key in ("precision", "recall", "f1")),
        ]
        for name, found in results["by_label"].items()
    ]
    return header, rows


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 200, placeholder=" …")


def _mistakes(
    evaluation: Evaluation, places: Sequence[int], rows: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    shown = []
    for place, row in zip(places, rows):
        answer, right = evaluation.answers[place], evaluation.references[place]
        assert answer.probabilities is not None
        said = f"{evaluation.labels[answer.label]} ({answer.probabilities[answer.label]:.1%})"
        shown.append([str(row[ROW]), _shortened(row["text"]), evaluation.labels[right], said])
    return ["row", "text", "label", "answer"], shown
