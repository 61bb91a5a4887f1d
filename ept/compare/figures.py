"""The figures of a comparison: each is drawn when the runs for it are there.

They answer the questions of the paper's figures with our runs: score against parameters (its figure 1), methods by
model (3), few-shot (4a), time and score against prompt length (4b), number of spaces (5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runs.method_table import METHODS
from ..utils.plots import plot
from .published import published_scores
from .tables import Interval, MethodSummary, Setting

MARKERS = "osD^vP*Xh<>d"
X_LABELS = {
    "k_shot": "train rows (K)",
    "num_virtual_tokens": "virtual tokens",
    "num_spaces": "number of spaces K",
    "r": "rank r",
}
ROUND_NUMBERS = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
SIZE_SWEEPS = (None, "budget", "num_virtual_tokens", "num_spaces", "r")
"""Points that differ in the adapter's size alone."""


def draw(settings: Sequence[Setting], folder: Path, published: bool = False) -> list[Path]:
    """Draws every figure that `settings` has runs for into `folder`; returns their paths.

    Args:
        published: adds published T5-Base results to the figure of score against parameters, where they cover the tasks.
    """
    files = []
    sized = [setting for setting in settings if setting.sweep in SIZE_SWEEPS and _methods(setting)]
    if sized:
        files.append(score_against_parameters(sized, folder / "score_against_parameters.png", published))
    models = _swept(settings, "model")
    if models:
        files.append(methods_by_model(models, folder / "methods_by_model.png"))
    for sweep in X_LABELS:
        points = _swept(settings, sweep)
        if points:
            files.append(score_against(sweep, points, folder / f"score_against_{sweep}.png"))
    return files


def score_against_parameters(settings: Sequence[Setting], file: Path, published: bool) -> Path:
    """Draws a point for each method and size: mean score with its interval over trainable parameters."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ours = {
        name: {m.parameters: m.mean for s in settings for m in _methods(s) if m.method == name and m.mean is not None}
        for name in _names(settings)
    }
    theirs = published_scores(settings[0].tasks) if published else []
    sizes = [size for found in ours.values() for size in found] + [size for _, size, _ in theirs]
    ends = (min(sizes) / 2, max(sizes) * 2)  # methods at one budget differ by a few parameters: no axis for these alone
    places = iter(side_by_side(sizes, step=0.018 * math.log10(ends[1] / ends[0])))
    size = {"width": 10 if published else 7, "height": max(4.2, 0.5 + 0.18 * (len(ours) + len(theirs)))}
    with _scores(file, settings, **size) as (axes,):
        for name, found in ours.items():
            points = [(next(places), mean) for mean in found.values()]
            _series(axes, name, sorted(points, key=lambda point: point[0]), line=len(found) > 1)
        for number, (label, _, score) in enumerate(theirs, start=1):
            style = {"marker": f"${number}$", "color": "black", "linewidths": 0.1, "s": 50 if number < 10 else 90}
            axes.scatter([next(places)], [score], label=f"published, T5-Base: {label}", **style)
        axes.set_xscale("log")
        axes.set_xlim(ends)
        axes.set_xlabel("trainable parameters (equal budgets side by side)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if ends[1] / ends[0] < 100:
            axes.set_xticks([value for value in ROUND_NUMBERS if ends[0] <= value <= ends[1]])
            axes.xaxis.set_minor_formatter(NullFormatter())
    return file


def side_by_side(sizes: Sequence[int], step: float, reach: float = 0.4) -> list[float]:
    """Where to draw points of these sizes: those within a tenth of each other lie `step` decades apart, in their order.

    Args:
        reach: most decades from the first to the last of such neighbours.
    """
    places = [0.0] * len(sizes)
    left = sorted(range(len(sizes)), key=lambda i: sizes[i])
    while left:
        near = sorted(i for i in left if sizes[i] <= 1.1 * sizes[left[0]])
        left = [i for i in left if i not in near]
        apart = min(step, reach / len(near))
        for place, i in enumerate(near):
            places[i] = sizes[i] * 10 ** (apart * (place - (len(near) - 1) / 2))
    return places


def methods_by_model(settings: Sequence[Setting], file: Path) -> Path:
    """Draws a group of bars for each base model, one bar a method."""
    names = _names(settings)
    width = 0.8 / len(names)
    with _scores(file, settings) as (axes,):
        for place, name in enumerate(names):
            aside = (place - (len(names) - 1) / 2) * width
            means = [(i, m.mean) for i, s in enumerate(settings) for m in _methods(s) if m.method == name and m.mean]
            heights, reach = _bars([mean for _, mean in means])
            style = {"color": _colour(name), "label": METHODS[name].title, "capsize": 3}
            axes.bar([i + aside for i, _ in means], heights, width, yerr=reach, **style)
        axes.set_xticks(range(len(settings)), [Path(str(setting.value)).name for setting in settings])
        axes.set_xlabel("base model")
    return file


def score_against(sweep: str, settings: Sequence[Setting], file: Path) -> Path:
    """Draws a line for each method over the swept value; for the prompt's length its step time as well."""
    timed = sweep == "num_virtual_tokens"
    names = _names(settings)
    logarithmic = all(setting.value > 0 for setting in settings)
    with _scores(file, settings, panels=2 if timed else 1, height=8.4 if timed else 4.2) as panels:
        for place, name in enumerate(names):
            aside = 0.06 * (place - (len(names) - 1) / 2)  # side by side, so that the bars do not hide each other
            found = [
                (s.value * 2**aside if logarithmic else s.value + aside, m)
                for s in settings
                for m in _methods(s)
                if m.method == name
            ]
            _series(panels[0], name, [(value, m.mean) for value, m in found if m.mean is not None])
            if timed:
                times = [(value, m.step_time_ms) for value, m in found if m.step_time_ms is not None]
                panels[1].plot([value for value, _ in times], [time for _, time in times], **_style(name))
        values = [setting.value for setting in settings]
        for axes in panels:
            if logarithmic:
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
        if timed:
            panels[1].set_ylabel("median step (ms)")
            panels[1].set_ylim(bottom=0)
        panels[-1].set_xlabel(X_LABELS[sweep])
    return file


def _swept(settings: Sequence[Setting], sweep: str) -> list[Setting]:
    """The points of one sweep that have results, in rising order of numbers."""
    points = [setting for setting in settings if setting.sweep == sweep and _methods(setting)]
    numbers = all(isinstance(point.value, (int, float)) for point in points)
    return sorted(points, key=lambda point: point.value) if numbers else points


def _methods(setting: Setting) -> list[MethodSummary]:
    """Those that have a mean over all tasks."""
    return [m for m in setting.methods if m.mean is not None]


def _names(settings: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(m.method for setting in settings for m in _methods(setting)))


def _title(setting: Setting) -> str:
    tasks = setting.tasks[0] if len(setting.tasks) == 1 else f"mean over {len(setting.tasks)} tasks"
    means = [m.mean for m in _methods(setting) if m.mean is not None]
    seeds = max(mean.n for mean in means)
    return f"{tasks}, {seeds} seeds, bars: 95 % interval within 0 .. 100" if seeds > 1 else f"{tasks}, 1 seed"


def _bars(means: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Heights in percent, and how far error bars reach down and up: no farther than a score can be."""
    heights = [100 * mean.mean for mean in means]
    halves = [100 * (mean.half_width or 0.0) for mean in means]
    down = [min(half, height - (0 if height >= 0 else -100)) for half, height in zip(halves, heights)]
    return heights, [down, [min(half, 100 - height) for half, height in zip(halves, heights)]]


def _colour(name: str) -> Any:
    from matplotlib import colormaps

    place = list(METHODS).index(name)
    return colormaps["tab10"](place) if place < 10 else colormaps["Dark2"](place - 10)


def _style(name: str, line: bool = True) -> dict[str, Any]:
    marker = MARKERS[list(METHODS).index(name) % len(MARKERS)]
    return {"color": _colour(name), "marker": marker, "linestyle": "-" if line else "", "label": METHODS[name].title}


def _series(axes: Any, name: str, points: Sequence[tuple[Any, Interval]], line: bool = True) -> None:
    if points:
        heights, reach = _bars([mean for _, mean in points])
        axes.errorbar([x for x, _ in points], heights, yerr=reach, capsize=3, **_style(name, line))


@contextmanager
def _scores(file: Path, settings: Sequence[Setting], **options: Any) -> Iterator[list[Any]]:
    """A plot whose first panel is of scores; the methods' names stand beside it."""
    with plot(file, _title(settings[0]), legend="beside", **options) as panels:
        yield panels
        panels[0].set_ylabel("score on test (%)")
        panels[0].set_ylim(top=min(panels[0].get_ylim()[1], 102))
