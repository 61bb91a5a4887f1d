"""What a person looks at after a run: the learning curve and a table of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table


def learning_curve(
    events: list[dict[str, Any]],
    file: Path,
    metric: str,
    majority: float,
    title: str = "",
    test: list[tuple[int, float]] | None = None,
) -> None:
    """Draws training loss and validation score over the steps into a PNG.

    Args:
        events: lines of `metrics.jsonl`; those with `loss` and with `eval_<metric>` are drawn.
        majority: score of always answering the commonest label, drawn as a line.
        test: (step, score) on the test split, drawn as stars: before training and at the best step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    scores = [(event["step"], event[f"eval_{metric}"]) for event in events if f"eval_{metric}" in event]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)

    upper.plot(*_columns(losses), color="tab:blue", marker="." if len(losses) < 50 else None)
    upper.set_ylabel("training loss (nats)")
    best = max((score for _, score in scores), default=float("nan"))
    lower.plot(*_columns(scores), color="tab:green", marker="o", label=f"{metric} on validation, best {best:.3f}")
    lower.axhline(majority, color="tab:gray", linestyle="--", label=f"majority class on test {majority:.3f}")
    lower.set_ylabel(f"{metric} (fraction)" if metric != "matthews_correlation" else "Matthews correlation (-1..1)")
    lower.set_xlabel("optimiser step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    if test:
        lower.scatter(
            *_columns(test),
            color="tab:red",
            marker="*",
            s=120,
            zorder=3,
            label="on test, before and after" if len(test) > 1 else "on test",
        )
    lower.margins(y=0.15)
    lower.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
    upper.set_title(title)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(file)


def results_table(results: dict[str, Any]) -> Table:
    """A run's results, as a person wants to read them."""
    metric = results["metric"]
    table = Table(title=f"{results['method']} on {results['task']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = results["rows"]["test"]
    if results["score_before"] is not None:
        table.add_row(f"{metric} before training", f"{results['score_before']:.4f}")
    table.add_row(f"{metric} after training", f"{results['score']:.4f}")
    table.add_row("majority class", f"{results['majority']:.4f}")
    for name, value in results["test_metrics"].items():
        if name != metric and (name != "unparsable" or value > 0):
            table.add_row(name, f"{value:.4f}")
    table.add_row("test rows", f"{rows:,}")
    table.add_row("trainable parameters", f"{results['trainable_parameters']:,}")
    table.add_row("steps (best at)", f"{results['steps']} ({results['best_step']})")
    table.add_row("training time", f"{results['train_seconds']:.1f} s")
    if results["step_time_ms"] is not None:
        table.add_row("median step", f"{results['step_time_ms']:.1f} ms")
    table.add_row(f"peak memory ({results['peak_memory_kind']})", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB")
    return table


def metrics_table(title: str, metrics: dict[str, float]) -> Table:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
