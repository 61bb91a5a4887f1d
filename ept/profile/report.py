"""The report of a profile: a table of steps, one of their phases, and plots of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..utils.plots import plot
from ..utils.tables import table
from .clock import PHASES
from .kinds import KINDS, LAUNCHES

PHASE_COLOURS = ("tab:purple", "tab:pink", "tab:blue", "tab:cyan", "tab:red", "tab:gray")
_NAMES = {"pt": "PT", "dept": "DePT", "ept": "EPT", "ept-token": "EPT (token-dependent)", "peft-pt": "PEFT's PT"}


def steps_table(report: dict[str, Any]) -> Table:
    """Returns a row for each method: parameters, step time with its spread, throughput, memory, speed-up."""
    faster = f"times as fast\nas {report['reference']}"
    columns = ("parameters", "step, ms\n(20-80 %)", "text\ntokens/s", "peak\nMiB", faster)
    rows = [
        (
            f"{method['trainable_parameters']:,}",
            _spread(method["step_ms"], digits=0 if method["step_ms"]["median"] >= 100 else 2),
            f"{method['tokens_per_second']:,.0f}",
            f"{method['peak_memory_bytes'] / 2**20:,.1f}",
            _spread(method["speedup"], digits=2),
        )
        for method in report["methods"]
    ]
    caption = f"peak: {report['peak_memory_kind']}"
    return _by_method(report, columns, rows, f"training steps of {title(report)}", caption)


def phases_table(report: dict[str, Any]) -> Table:
    """Returns a row for each method: milliseconds of each phase of the step."""
    columns = [*(phase.replace(" ", "\n") for phase in PHASES), "sum /\nstep"]
    rows = [
        [*(f"{method['phases_ms'][phase]:.2f}" for phase in PHASES), f"{method['phases_over_step']:.3f}"]
        for method in report["methods"]
    ]
    return _by_method(report, columns, rows, "where a step's time goes, ms")


def shares_table(report: dict[str, Any]) -> Table:
    """Returns a row for each method: the fraction of a step that each kind of work takes."""
    kinds = (*KINDS, LAUNCHES)
    rows = [[f"{method['shares'][kind]:.1%}" for kind in kinds] for method in report["methods"]]
    caption = "one profiled step; launches: the time between operators, or in which a device waits"
    return _by_method(report, [kind.replace(" ", "\n") for kind in kinds], rows, "a step by kind of work", caption)


def draw_phases(report: dict[str, Any], file: Path) -> None:
    """Draws a stacked bar for each method as a PNG."""
    methods = report["methods"]
    names = [f"{_NAMES[m['method']]}, {m['num_virtual_tokens']} tokens" for m in methods]
    with plot(file, title(report), width=8, height=1.8 + 0.45 * len(methods), legend_columns=4) as (axes,):
        draw_bars(axes, names, [m["phases_ms"] for m in methods], [m["step_ms"] for m in methods])


def draw_bars(
    axes: Any,
    names: Sequence[str],
    phases: Sequence[dict[str, float]],
    steps: Sequence[dict[str, Any]],
    unit: float = 1,
) -> None:
    """Draws a bar for each name, the first on top, with its phases one after another and the spread of the whole step.

    Args:
        unit: milliseconds of one of the values.
    """
    left = [0.0] * len(names)
    for phase, colour in zip(phases[0], PHASE_COLOURS):
        widths = [unit * found[phase] for found in phases]
        axes.barh(names, widths, left=left, color=colour, label=phase.replace("_", " "))
        left = [start + width for start, width in zip(left, widths)]
    medians = [unit * step["median"] for step in steps]
    spread = [[unit * abs(step[q] - step["median"]) for step in steps] for q in ("p20", "p80")]
    axes.errorbar(medians, names, xerr=spread, fmt="none", ecolor="black", capsize=3, label="step, 20 to 80 %")
    axes.set_xlabel("time of a training step (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def draw_sweep(report: dict[str, Any], file: Path) -> None:
    """Draws step time over prompt length as a PNG, a line for each method."""
    with plot(file, title(report), width=8, height=4.5, legend_columns=4) as (axes,):
        for name in dict.fromkeys(method["method"] for method in report["methods"]):
            of_method = [method for method in report["methods"] if method["method"] == name]
            points = sorted((method["num_virtual_tokens"], method["step_ms"]) for method in of_method)
            lengths = [length for length, _ in points]
            (line,) = axes.plot(lengths, [step["median"] for _, step in points], marker="o", label=_NAMES[name])
            low, high = ([step[quantile] for _, step in points] for quantile in ("p20", "p80"))
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
        axes.set_xlabel("prompt length (virtual tokens)")
        axes.set_ylabel("time of a training step (ms)\nmedian, shaded 20 to 80 %")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)


def title(report: dict[str, Any]) -> str:
    """Returns model, precision, batch and machine in one line."""
    model = report["model"]
    name = Path(str(model["name"])).name
    layers = f", {model['layers']} layer{'s' if model['layers'] > 1 else ''}" if model["layers"] else ""
    kind = model["quantization"] or model["dtype"]
    padding = "" if report["data"]["padding"] == "none" else f", padded to {report['data']['padding']}"
    return f"{name}{layers}, {kind}, {report['batch']} × {report['length']} tokens{padding}, {report['device']}"


def _by_method(
    report: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]], text: str, caption: str | None = None
) -> Table:
    names = [f"{method['method']}:{method['num_virtual_tokens']}" for method in report["methods"]]
    whole = [(name, *row) for name, row in zip(names, rows)]
    built = table(("method", *columns), whole, text, box=None, padding=(0, 1, 0, 0), caption=caption)
    for column in built.columns:
        column.no_wrap = True
    return built


def _spread(values: dict[str, float], digits: int) -> str:
    """Returns the median and, in brackets, the 20 % and 80 % quantiles."""
    return f"{values['median']:.{digits}f} ({values['p20']:.{digits}f}-{values['p80']:.{digits}f})"
