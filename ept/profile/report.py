"""What a person looks at after a profile: the table, the split of a step, and the curve over the prompt's length."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .clock import PHASES

PHASE_COLOURS = ("tab:purple", "tab:pink", "tab:blue", "tab:cyan", "tab:red", "tab:gray")
TITLE_WIDTH = 85  # characters of a line
_NAMES = {"pt": "PT", "dept": "DePT", "ept": "EPT", "peft-pt": "PEFT's PT"}


def steps_table(report: dict[str, Any]) -> Table:
    """A row a method: parameters, step time with spread, throughput, memory, speed-up."""
    columns = (
        "parameters",
        "step, ms\n(20-80 %)",
        "text\ntokens/s",
        "peak\nMiB",
        f"times as fast\nas {report['reference']}",
    )
    table = _table(f"training steps of {title(report)}", columns)
    for method in report["methods"]:
        table.add_row(
            _name(method),
            f"{method['trainable_parameters']:,}",
            _spread(method["step_ms"], digits=0 if method["step_ms"]["median"] >= 100 else 2),
            f"{method['tokens_per_second']:,.0f}",
            f"{method['peak_memory_bytes'] / 2**20:,.1f}",
            _spread(method["speedup"], digits=2),
        )
    table.caption = f"peak: {report['peak_memory_kind']}"
    return table


def phases_table(report: dict[str, Any]) -> Table:
    """A row a method: milliseconds of each phase of the step."""
    table = _table("where a step's time goes, ms", [*(phase.replace(" ", "\n") for phase in PHASES), "sum /\nstep"])
    for method in report["methods"]:
        shown = [f"{method['phases_ms'][phase]:.2f}" for phase in PHASES]
        table.add_row(_name(method), *shown, f"{method['phases_over_step']:.3f}")
    return table


def draw_phases(report: dict[str, Any], file: Path) -> None:
    """A stacked bar a method, into a PNG."""
    figure, axes = _figure(height=1.8 + 0.45 * len(report["methods"]))
    methods = list(reversed(report["methods"]))  # the first on top
    labels = [_label(method) for method in methods]
    left = [0.0] * len(methods)
    for phase, colour in zip(PHASES, PHASE_COLOURS):
        widths = [method["phases_ms"][phase] for method in methods]
        axes.barh(labels, widths, left=left, color=colour, label=phase)
        left = [start + width for start, width in zip(left, widths)]
    low, high = ([abs(m["step_ms"][q] - m["step_ms"]["median"]) for m in methods] for q in ("p20", "p80"))
    medians = [method["step_ms"]["median"] for method in methods]
    axes.errorbar(medians, labels, xerr=[low, high], fmt="none", ecolor="black", capsize=3, label="step, 20 to 80 %")
    axes.set_xlabel("time of a training step (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    _finish(figure, axes, title(report), file, columns=4)


def draw_sweep(report: dict[str, Any], file: Path) -> None:
    """Step time over the prompt's length, a line a method, into a PNG."""
    figure, axes = _figure(height=4.5)
    for name in dict.fromkeys(method["method"] for method in report["methods"]):
        points = sorted(
            (method["num_virtual_tokens"], method["step_ms"])
            for method in report["methods"]
            if method["method"] == name
        )
        lengths = [length for length, _ in points]
        (line,) = axes.plot(lengths, [step["median"] for _, step in points], marker="o", label=_NAMES[name])
        low, high = ([step[quantile] for _, step in points] for quantile in ("p20", "p80"))
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
    axes.set_xlabel("prompt length (virtual tokens)")
    axes.set_ylabel("time of a training step (ms)\nmedian, shaded 20 to 80 %")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _finish(figure, axes, title(report), file, columns=4)


def title(report: dict[str, Any]) -> str:
    """Model, precision, batch and machine in a line."""
    model = report["model"]
    name = Path(str(model["name"])).name
    layers = f", {model['layers']} layers" if model["layers"] else ""
    kind = model["quantization"] or model["dtype"]
    padding = "" if report["data"]["padding"] == "none" else f", padded to {report['data']['padding']}"
    return f"{name}{layers}, {kind}, {report['batch']} × {report['length']} tokens{padding}, {report['device']}"


def _table(text: str, columns: Sequence[str]) -> Table:
    table = Table(title=text, box=None, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _spread(values: dict[str, float], digits: int) -> str:
    """Median and, in brackets, the 20 and 80 % quantiles."""
    return f"{values['median']:.{digits}f} ({values['p20']:.{digits}f}-{values['p80']:.{digits}f})"


def _name(method: dict[str, Any]) -> str:
    return f"{method['method']}:{method['num_virtual_tokens']}"


def _label(method: dict[str, Any]) -> str:
    return f"{_NAMES[method['method']]}, {method['num_virtual_tokens']} tokens"


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, text: str, file: Path, columns: int) -> None:
    figure.suptitle(textwrap.fill(text, TITLE_WIDTH), fontsize="medium")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(file)
