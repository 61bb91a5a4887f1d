"""Plots of a record: bandwidth over size, speed-up over the number of tokens, step time by method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ept.profile.report import draw_bars
from ept.utils.plots import plot

from .record import Row, by_case
from .shapes import BITSANDBYTES, COMPILED, COPY, EAGER, OURS, OURS_AGAIN, PEFT, PRODUCTS

COLOURS = {
    OURS: "#1f77b4",
    EAGER: "#7f7f7f",
    COMPILED: "#ff7f0e",
    BITSANDBYTES: "#d62728",
    PEFT: "#9467bd",
    COPY: "#bcbd22",
}
METHOD_TITLES = {
    "pt": "prompt tuning",
    "dept": "DePT",
    "ept": "EPT",
    "peft-pt": "PEFT prompt tuning",
}
BANDWIDTH_KERNELS = ("prompted_embedding", "prompted_embedding_backward", "dequantize_4bit")

Lines = dict[str, dict[str, dict[int, Any]]]  # panel → line → x → point


class Plot(NamedTuple):
    """The suffix of the file's name, the caption, and the function that draws the plot as a PNG."""

    name: str
    caption: str
    draw: Callable[[Path], None]


def drawable(results: list[Row]) -> list[Plot]:
    """Lists the plots for which `results` has enough points."""

    def has_line(panels: Lines) -> bool:
        return any(len(points) > 1 for lines in panels.values() for points in lines.values())

    bandwidth = "Bandwidth over size: the least bytes that the operator must move, over its time."
    speedup = "Products with 4-bit weights: time of bitsandbytes over ours, over the number of tokens."
    steps = "Time of a whole training step by method and phase."
    found = [
        (has_line(bandwidth_lines(results)), "bandwidth", bandwidth, draw_bandwidth),
        (has_line(speedup_lines(results)), "speedup", speedup, draw_speedup),
        (bool(step_bars(results)), "steps", steps, draw_steps),
    ]
    return [Plot(name, caption, functools.partial(draw, results)) for enough, name, caption, draw in found if enough]


def bandwidth_lines(results: list[Row]) -> Lines:
    """Returns memory-bound kernels: kernel → version → bytes moved → row. Later cases of a kernel count only if dtype,
    scheme and rank equal the first one's, so that a line connects sizes of one problem.
    """
    found: Lines = {}
    kind: dict[str, tuple[Any, ...]] = {}
    for row in results:
        wanted = row["section"] == "kernels" and row["kernel"] in BANDWIDTH_KERNELS and row["provider"] != OURS_AGAIN
        if wanted and row["status"] == "ok":
            this = row["dtype"], row["scheme"], row["size"].get("rank")
            if this == kind.setdefault(row["kernel"], this):
                found.setdefault(row["kernel"], {}).setdefault(row["provider"], {})[row["bytes"]] = row
    return found


def speedup_lines(results: list[Row]) -> Lines:
    """Returns products with 4-bit weights for which our kernels ran: kernel → layer → tokens M → bitsandbytes' time
    over ours.
    """
    found: Lines = {}
    for rows in by_case(row for row in results if row["section"] == "kernels" and row["status"] == "ok").values():
        ours, peer = rows.get(OURS), rows.get(BITSANDBYTES)
        if ours and peer and ours["kernel"] in PRODUCTS and ours["backend"] == "triton":
            layer = f"{ours['size']['rows']}×{ours['size']['columns']} {ours['dtype']}"
            line = found.setdefault(ours["kernel"], {}).setdefault(layer, {})
            line[ours["size"]["m"]] = peer["median"] / ours["median"]
    return found


def step_bars(results: list[Row]) -> dict[str, dict[str, Row]]:
    """Returns whole steps that were split into phases: case → method → row."""
    return by_case(row for row in results if row["section"] == "steps" and row["status"] == "ok" and "phases" in row)


def draw_bandwidth(results: list[Row], path: Path) -> None:
    """Draws GB/s over megabytes moved, one panel per kernel, with the measured copy bandwidth as a line."""
    from matplotlib.ticker import LogLocator

    for panel, (kernel, lines) in _panels(path, bandwidth_lines(results)):
        ceiling = max(row["ceilings"]["bytes_per_second"] for points in lines.values() for row in points.values())
        for provider, points in lines.items():
            rows = [points[moved] for moved in sorted(points)]
            x, y = [row["bytes"] / 1e6 for row in rows], [row["bytes_per_second"] / 1e9 for row in rows]
            panel.plot(x, y, marker="o", markersize=4, label=provider, color=COLOURS[provider])
        panel.axhline(ceiling / 1e9, color="black", linestyle="--", linewidth=1, label="copy (ceiling)")
        panel.set(xscale="log", xlabel="least bytes moved (MB)", ylabel="least bytes moved / time (GB/s)", title=kernel)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # labels within a decade too
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set_ylim(bottom=0)


def draw_speedup(results: list[Row], path: Path) -> None:
    """Draws bitsandbytes' time over ours, over M: a panel per product, a line per layer (of the same colour in all)."""
    kernels = speedup_lines(results)
    # Ten colours, then the same ones with another marker and dashes, so that no two lines look alike.
    marks = list(zip("os^D", ("-", "--", ":", "-.")))
    layers = list(dict.fromkeys(layer for lines in kernels.values() for layer in lines))
    styles = {layer: (f"C{i % 10}", *marks[i // 10 % len(marks)]) for i, layer in enumerate(layers)}
    for panel, (kernel, lines) in _panels(path, kernels):
        for layer, points in lines.items():
            tokens, (colour, marker, dashes) = sorted(points), styles[layer]
            style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4}
            panel.plot(tokens, [points[m] for m in tokens], label=layer, **style)
        panel.axhline(1, color="black", linestyle="--", linewidth=1, label="bitsandbytes")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="tokens M", ylabel="speed-up over bitsandbytes", title=kernel)
        panel.set_ylim(bottom=0)


def draw_steps(results: list[Row], path: Path) -> None:
    """Draws the time of a training step by method, stacked by phase, with 20 and 80 % quantiles; a panel per case."""
    cases = step_bars(results)
    for panel, (case, methods) in _panels(path, cases, height=1.2 + 0.5 * max(map(len, cases.values()))):
        rows = list(methods.values())
        names = [METHOD_TITLES.get(method, method) for method in methods]
        draw_bars(panel, names, [row["phases"] for row in rows], rows, unit=1e3)
        size = rows[0]["size"]
        panel.set_title(f"{case.removeprefix('steps/')}, {size['batch']}×{size['length']}")


def _panels(path: Path, content: dict[str, Any], height: float = 3.4) -> Iterator[tuple[Any, tuple[str, Any]]]:
    """Yields a panel of `height` inches with each item of `content`: up to three in a row, more in rows of two."""
    number = len(content)
    columns = number if number <= 3 else 2
    size: dict[str, Any] = {"width": 5.2 * columns, "height": height * -(-number // columns) + 1.0}
    legend_columns = max(2, round(size["width"] / 2.2))
    with plot(path, panels=number, columns=columns, **size, legend_columns=legend_columns, dpi=120) as panels:
        yield from zip(panels, content.items())
