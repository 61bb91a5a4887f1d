"""Plots of a record: bandwidth over size, speed-up over the number of tokens, step time by method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .shapes import BITSANDBYTES, DENSE, OURS, OURS_AGAIN
from .tables import by_case

Row = dict[str, Any]

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
PHASE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f", "#e377c2")
BANDWIDTH_KERNELS = ("prompted_embedding", "prompted_embedding_backward", "dequantize_4bit")
PRODUCTS = ("matmul_4bit", "matmul_4bit_backward")


def drawable(results: list[Row]) -> dict[str, Callable[[list[Row], Path], None]]:
    """The plots for which ``results`` has enough points: name → function that draws one to a PNG file."""
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
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set_ylim(bottom=0)
    _finish(figure, panels, path)


def draw_speedup(results: list[Row], path: Path) -> None:
    """Time of bitsandbytes over ours, over M, one panel a product, one line a layer."""
    lines = speedup_lines(results)
    figure, panels = _panels(len(lines))
    for panel, (kernel, layers) in zip(panels, lines.items()):
        for layer, points in layers.items():
            tokens = sorted(points)
            panel.plot(tokens, [points[m] for m in tokens], marker="o", markersize=4, label=layer)
        panel.axhline(1, color="black", linestyle="--", linewidth=1, label="bitsandbytes")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="tokens M", ylabel="speed-up over bitsandbytes", title=kernel)
        panel.set_ylim(bottom=0)
    _finish(figure, panels, path)


def draw_steps(results: list[Row], path: Path) -> None:
    """Time of a training step by method, stacked by phase, one panel a model."""
    cases = step_bars(results)
    figure, panels = _panels(len(cases))
    for panel, (case, methods) in zip(panels, cases.items()):
        names = [METHOD_TITLES.get(method, method) for method in methods]
        left = [0.0] * len(methods)
        for phase, colour in zip(next(iter(methods.values()))["phases"], PHASE_COLOURS):
            widths = [1e3 * row["phases"][phase] for row in methods.values()]
            panel.barh(names, widths, left=left, label=phase.replace("_", " "), color=colour)
            left = [a + b for a, b in zip(left, widths)]
        size = next(iter(methods.values()))["size"]
        panel.set(
            xlabel="time of a step (ms)", title=f"{case.removeprefix('steps/')}, {size['batch']}×{size['length']}"
        )
        panel.invert_yaxis()
    _finish(figure, panels, path)


def _panels(number: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, number, figsize=(5.2 * number, 4.4), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _finish(figure: Any, panels: list[Any], path: Path) -> None:
    from matplotlib import pyplot

    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
