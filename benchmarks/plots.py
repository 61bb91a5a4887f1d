"""Plots of a record: bandwidth over size, speed-up over the number of tokens, step time by method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ept.profile.report import PHASE_COLOURS
from ept.utils.plots import plot

from .record import Row
from .shapes import BITSANDBYTES, COMPILED, DENSE, EAGER, OURS, OURS_AGAIN, PEFT, PRODUCTS
from .tables import by_case

COLOURS = {
    OURS: "#1f77b4",
    EAGER: "#7f7f7f",
    COMPILED: "#ff7f0e",
    BITSANDBYTES: "#d62728",
    PEFT: "#9467bd",
    DENSE: "#2ca02c",
}
METHOD_TITLES = {
    "pt": "prompt tuning",
    "dept": "DePT",
    "ept": "EPT",
    "peft-pt": "PEFT prompt tuning",
    "peft-pt again": "PEFT, again",
}
BANDWIDTH_KERNELS = ("prompted_embedding", "prompted_embedding_backward", "dequantize_4bit")

Points = dict[float, Row]


def drawable(results: list[Row]) -> dict[str, Callable[[list[Row], Path], None]]:
    """Returns the plots for which `results` has enough points: name → function that draws one to a PNG file."""
    plots: dict[str, Callable[[list[Row], Path], None]] = {}
    if any(len(points) > 1 for lines in bandwidth_lines(results).values() for points in lines.values()):
        plots["bandwidth"] = draw_bandwidth
    if any(len(points) > 1 for lines in speedup_lines(results).values() for points in lines.values()):
        plots["speedup"] = draw_speedup
    if step_bars(results):
        plots["steps"] = draw_steps
    return plots


def bandwidth_lines(results: list[Row]) -> dict[str, dict[str, Points]]:
    """Returns memory-bound kernels: kernel → version → bytes moved → row. Of each kernel only what has the first case's
    dtype, scheme and rank, so that a line joins sizes of one problem.
    """
    found: dict[str, dict[str, Points]] = {}
    kind: dict[str, tuple[Any, ...]] = {}
    for row in results:
        wanted = row["section"] == "kernels" and row["kernel"] in BANDWIDTH_KERNELS and row["provider"] != OURS_AGAIN
        if not wanted or row["status"] != "ok":
            continue
        this = row["dtype"], row["scheme"], row["size"].get("rank")
        if this == kind.setdefault(row["kernel"], this):
            found.setdefault(row["kernel"], {}).setdefault(row["provider"], {})[row["bytes"]] = row
    return found


def speedup_lines(results: list[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """Returns products with 4-bit weights where our kernels ran: kernel → layer → tokens M → bitsandbytes' time over
    ours.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for rows in by_case(results).values():
        ours, peer = rows.get(OURS), rows.get(BITSANDBYTES)
        if ours and peer and ours["kernel"] in PRODUCTS and ours["status"] == peer["status"] == "ok":
            if ours["backend"] != "triton":
                continue
            layer = f"{ours['size']['rows']}×{ours['size']['columns']} {ours['dtype']}"
            line = found.setdefault(ours["kernel"], {}).setdefault(layer, {})
            line[ours["size"]["m"]] = peer["median"] / ours["median"]
    return found


def step_bars(results: list[Row]) -> dict[str, dict[str, Row]]:
    """Returns whole steps that were split into phases: case → method → row."""
    found: dict[str, dict[str, Row]] = {}
    for row in results:
        if row["section"] == "steps" and row["status"] == "ok" and "phases" in row:
            found.setdefault(row["case"], {})[row["provider"]] = row
    return found


def draw_bandwidth(results: list[Row], path: Path) -> None:
    """Draws GB/s over megabytes moved, one panel a kernel, the measured copy bandwidth as a line."""
    from matplotlib.ticker import LogLocator

    kernels = bandwidth_lines(results)
    with _panels(path, len(kernels)) as panels:
        for panel, (kernel, lines) in zip(panels, kernels.items()):
            ceiling = max(row["ceilings"]["bytes_per_second"] for points in lines.values() for row in points.values())
            for provider, points in lines.items():
                rows = [points[moved] for moved in sorted(points)]
                x, y = [row["bytes"] / 1e6 for row in rows], [row["bytes_per_second"] / 1e9 for row in rows]
                panel.plot(x, y, marker="o", markersize=4, label=provider, color=COLOURS[provider])
            panel.axhline(ceiling / 1e9, color="black", linestyle="--", linewidth=1, label="copy (ceiling)")
            panel.set(
                xscale="log", xlabel="least bytes moved (MB)", ylabel="least bytes moved / time (GB/s)", title=kernel
            )
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # numbers within a decade too
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
            panel.set_ylim(bottom=0)


def draw_speedup(results: list[Row], path: Path) -> None:
    """Draws time of bitsandbytes over ours, over M, one panel a product, one line a layer (of one colour in all)."""
    lines = speedup_lines(results)
    styles = _line_styles(list(dict.fromkeys(layer for layers in lines.values() for layer in layers)))
    with _panels(path, len(lines)) as panels:
        for panel, (kernel, layers) in zip(panels, lines.items()):
            for layer, points in layers.items():
                tokens = sorted(points)
                panel.plot(tokens, [points[m] for m in tokens], markersize=4, label=layer, **styles[layer])
            panel.axhline(1, color="black", linestyle="--", linewidth=1, label="bitsandbytes")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set(xlabel="tokens M", ylabel="speed-up over bitsandbytes", title=kernel)
            panel.set_ylim(bottom=0)


def _line_styles(names: list[str]) -> dict[str, Row]:
    """Assigns ten colours, then the same ones with another marker and dashes, so that no two lines look alike."""
    marks = [{"marker": marker, "linestyle": dashes} for marker, dashes in zip("os^D", ("-", "--", ":", "-."))]
    return {name: {"color": f"C{i % 10}", **marks[i // 10 % len(marks)]} for i, name in enumerate(names)}


def draw_steps(results: list[Row], path: Path) -> None:
    """Draws the time of a training step by method, stacked by phase, with its 20 and 80 %; one panel a case."""
    cases = step_bars(results)
    with _panels(path, len(cases), height=1.2 + 0.5 * max(map(len, cases.values()))) as panels:
        for panel, (case, methods) in zip(panels, cases.items()):
            rows = list(methods.values())
            names = [METHOD_TITLES.get(method, method) for method in methods]
            left = [0.0] * len(rows)
            for phase, colour in zip(rows[0]["phases"], PHASE_COLOURS):
                widths = [1e3 * row["phases"][phase] for row in rows]
                panel.barh(names, widths, left=left, label=phase.replace("_", " "), color=colour)
                left = [a + b for a, b in zip(left, widths)]
            medians = [1e3 * row["median"] for row in rows]
            spread = [[1e3 * abs(row[q] - row["median"]) for row in rows] for q in ("p20", "p80")]
            panel.errorbar(medians, names, xerr=spread, fmt="none", ecolor="black", capsize=3, label="20 to 80 %")
            size = f"{rows[0]['size']['batch']}×{rows[0]['size']['length']}"
            panel.set(xlabel="time of a step (ms)", title=f"{case.removeprefix('steps/')}, {size}")
            panel.set_ylim(len(names) - 0.4, -0.6)  # the first on top


@contextmanager
def _panels(path: Path, number: int, height: float = 3.4) -> Iterator[list[Any]]:
    """Yields panels of `height` inches: up to three in a row, more in rows of two."""
    columns = number if number <= 3 else 2
    size = {"width": 5.2 * columns, "height": height * -(-number // columns) + 1.0}
    legend_columns = max(2, round(size["width"] / 2.2))
    with plot(path, panels=number, columns=columns, **size, legend_columns=legend_columns, dpi=120) as panels:
        yield panels
