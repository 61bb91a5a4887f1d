"""Plots of a record: bandwidth over size, speed-up over the number of tokens, step time by method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ept.profile.report import PHASE_COLOURS

from .record import Row
from .shapes import BITSANDBYTES, DENSE, OURS, OURS_AGAIN, PRODUCTS
from .tables import by_case

COLOURS = {
    OURS: "#1f77b4",
    "reference": "#7f7f7f",
    "torch.compile": "#ff7f0e",
    BITSANDBYTES: "#d62728",
    "PEFT": "#9467bd",
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


def drawable(results: list[Row]) -> dict[str, Callable[[list[Row], Path], None]]:
    """The plots for which `results` has enough points: name → function that draws one to a PNG file."""
    plots: dict[str, Callable[[list[Row], Path], None]] = {}
    if any(len(points) > 1 for lines in bandwidth_lines(results).values() for points in lines.values()):
        plots["bandwidth"] = draw_bandwidth
    if any(len(points) > 1 for lines in speedup_lines(results).values() for points in lines.values()):
        plots["speedup"] = draw_speedup
    if step_bars(results):
        plots["steps"] = draw_steps
    return plots


Points = dict[float, Row]


def bandwidth_lines(results: list[Row]) -> dict[str, dict[str, Points]]:
    """Memory-bound kernels: kernel → version → bytes moved → row. Of each kernel only what has the first case's dtype,
    scheme and rank, so that a line joins sizes of one problem.
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
    """Products with 4-bit weights where our kernels ran: kernel → layer → tokens M → bitsandbytes' time over ours."""
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
    """Whole steps that were split into phases: case → method → row."""
    found: dict[str, dict[str, Row]] = {}
    for row in results:
        if row["section"] == "steps" and row["status"] == "ok" and "phases" in row:
            found.setdefault(row["case"], {})[row["provider"]] = row
    return found


def draw_bandwidth(results: list[Row], path: Path) -> None:
    """GB/s over megabytes moved, one panel a kernel, the measured copy bandwidth as a line."""
    from matplotlib.ticker import LogLocator

    lines = bandwidth_lines(results)
    figure, panels = _panels(len(lines))
    for panel, (kernel, versions) in zip(panels, lines.items()):
        ceiling = 0.0
        for version, points in versions.items():
            sizes = sorted(points)
            rows = [points[size] for size in sizes]
            ceiling = max(ceiling, *(row["ceilings"]["bytes_per_second"] for row in rows))
            panel.plot(
                [size / 1e6 for size in sizes],
                [row["bytes_per_second"] / 1e9 for row in rows],
                marker="o",
                markersize=4,
                label=version,
                color=COLOURS[version],
            )
        panel.axhline(ceiling / 1e9, color="black", linestyle="--", linewidth=1, label="copy (ceiling)")
        panel.set(xscale="log", xlabel="least bytes moved (MB)", ylabel="least bytes moved / time (GB/s)", title=kernel)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # numbers within a decade too
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set_ylim(bottom=0)
    _finish(figure, panels, path)


def draw_speedup(results: list[Row], path: Path) -> None:
    """Time of bitsandbytes over ours, over M, one panel a product, one line a layer (of one colour in all panels)."""
    lines = speedup_lines(results)
    styles = _line_styles(list(dict.fromkeys(layer for layers in lines.values() for layer in layers)))
    figure, panels = _panels(len(lines))
    for panel, (kernel, layers) in zip(panels, lines.items()):
        for layer, points in layers.items():
            tokens = sorted(points)
            panel.plot(tokens, [points[m] for m in tokens], markersize=4, label=layer, **styles[layer])
        panel.axhline(1, color="black", linestyle="--", linewidth=1, label="bitsandbytes")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="tokens M", ylabel="speed-up over bitsandbytes", title=kernel)
        panel.set_ylim(bottom=0)
    _finish(figure, panels, path)


def _line_styles(names: list[str]) -> dict[str, Row]:
    """Ten colours, then the same ones with another marker and dashes, so that no two lines look alike."""
    marks = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
    styles = {}
    for index, name in enumerate(names):
        marker, dashes = marks[index // 10 % len(marks)]
        styles[name] = {"color": f"C{index % 10}", "marker": marker, "linestyle": dashes}
    return styles


def draw_steps(results: list[Row], path: Path) -> None:
    """Time of a training step by method, stacked by phase, with its 20 and 80 %; one panel a case."""
    cases = step_bars(results)
    figure, panels = _panels(len(cases), height=1.2 + 0.5 * max(map(len, cases.values())))
    for panel, (case, methods) in zip(panels, cases.items()):
        names = [METHOD_TITLES.get(method, method) for method in methods]
        left = [0.0] * len(methods)
        for phase, colour in zip(next(iter(methods.values()))["phases"], PHASE_COLOURS):
            widths = [1e3 * row["phases"][phase] for row in methods.values()]
            panel.barh(names, widths, left=left, label=phase.replace("_", " "), color=colour)
            left = [a + b for a, b in zip(left, widths)]
        medians = [1e3 * row["median"] for row in methods.values()]
        low, high = ([1e3 * abs(row[q] - row["median"]) for row in methods.values()] for q in ("p20", "p80"))
        panel.errorbar(medians, names, xerr=[low, high], fmt="none", ecolor="black", capsize=3, label="20 to 80 %")
        size = next(iter(methods.values()))["size"]
        panel.set(
            xlabel="time of a step (ms)", title=f"{case.removeprefix('steps/')}, {size['batch']}×{size['length']}"
        )
        panel.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    _finish(figure, panels, path)


def _panels(number: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure and its panels of `height` inches: up to three in a row, more in rows of two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = number if number <= 3 else 2
    rows = -(-number // columns)
    size = (5.2 * columns, height * rows + 1.0)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for unused in panels[number:]:
        unused.remove()
    return figure, panels[:number]


def _finish(figure: Any, panels: list[Any], path: Path) -> None:
    from matplotlib import pyplot

    named: dict[str, Any] = {}  # one legend for all panels
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_title(panel.get_title(), fontsize="medium")
        handles, labels = panel.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels) if label not in named}
    columns = max(2, round(figure.get_figwidth() / 2.2))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=columns, frameon=False, fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
