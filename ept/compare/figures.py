"""The figures of a comparison; each is drawn if its runs exist.

They show the paper's figures with our runs: score against parameters (its figure 1), methods by model (3), few-shot
(4a), time and score against prompt length (4b), number of spaces (5).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runs.method_table import METHODS
from ..utils.plots import name_ticks, plot
from .published import published_scores
from .tables import Interval, MethodSummary, Setting, seed_means

MARKERS = "osD^vP*Xh<>d"
X_LABELS = {
    "k_shot": "train rows (K)",
    "num_virtual_tokens": "virtual tokens",
    "num_spaces": "number of spaces K",
    "r": "rank r",
}
SIZE_SWEEPS = (None, "budget", "num_virtual_tokens", "num_spaces", "r")
"""Sweeps whose points differ only in the adapter's size."""


def draw(settings: Sequence[Setting], folder: Path, published: bool = False) -> list[Path]:
    """Draws every figure for which `settings` has runs into `folder`; returns their paths.

    Args:
        published: adds published T5-Base results to the figure of score against parameters, if they cover the tasks.
    """
    settings = [setting for setting in settings if any(m.mean for m in setting.methods)]
    files = []
    if sized := [setting for setting in settings if setting.sweep in SIZE_SWEEPS]:
        files.append(folder / "score_against_parameters.png")
        score_against_parameters(sized, files[-1], published)
    if settings and any(len(method.curve) > 1 for method in settings[0].methods):
        files.append(folder / "score_over_steps.png")
        score_over_steps(settings[0], files[-1])
    for sweep in ("model", *X_LABELS):
        if points := [setting for setting in settings if setting.sweep == sweep]:
            files.append(folder / ("methods_by_model.png" if sweep == "model" else f"score_against_{sweep}.png"))
            methods_by_model(points, files[-1]) if sweep == "model" else score_against(sweep, points, files[-1])
    return files


def score_against_parameters(settings: Sequence[Setting], file: Path, published: bool) -> None:
    """Draws a point for each method and size: mean score with its interval over stored parameters."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ours = {
        name: {
            (m.stored, m.parameters): (mean, [*seed_means(m.scores, m.tasks).values()]) for _, m, mean in found
        }  # K changes only the trained size
        for name, found in _by_method(settings).items()
    }
    theirs = published_scores(settings[0].tasks) if published else []
    sizes = [stored for found in ours.values() for stored, _ in found] + [size for _, size, _ in theirs]
    ends = (min(sizes) / 2, max(sizes) * 2)  # methods at one budget differ by a few parameters: no axis just for these
    places = iter(side_by_side(sizes, step=0.03 * math.log10(ends[1] / ends[0])))
    height = max(4.2, 0.5 + 0.18 * (len(ours) + len(theirs)))
    with _scores(file, settings, width=10 if published else 7, height=height) as (axes,):
        for name, found in ours.items():
            points = sorted(((next(places), *both) for both in found.values()), key=lambda point: point[0])
            _series(axes, name, [(x, mean) for x, mean, _ in points], line=len(found) > 1)
            seeds = [(x, 100 * score) for x, _, scores in points for score in scores if len(scores) > 1]
            if seeds:  # the interval of two or three seeds is wide, and hides where they are
                axes.scatter(*zip(*seeds), marker="_", s=60, color=_style(name)[1]["color"], label="each seed")
        for number, (label, _, score) in enumerate(theirs, start=1):
            style = {"marker": f"${number}$", "color": "black", "linewidths": 0.1, "s": 50 if number < 10 else 90}
            axes.scatter([next(places)], [score], label=f"published, T5-Base: {label}", **style)
        axes.set_xscale("log")
        axes.set_xlim(ends)
        axes.set_xlabel("stored parameters (equal sizes side by side)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if ends[1] / ends[0] < 100:
            round_numbers = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
            axes.set_xticks([value for value in round_numbers if ends[0] <= value <= ends[1]])
            axes.xaxis.set_minor_formatter(NullFormatter())


def score_over_steps(setting: Setting, file: Path) -> None:
    """Draws each method's mean validation score over the steps."""
    title, _ = _title([setting])
    with plot(file, title, legend="beside") as (axes,):
        for method in setting.methods:
            if len(method.curve) > 1:
                marker, style = _style(method.method)
                steps = sorted(method.curve)
                axes.plot(steps, [100 * method.curve[step] for step in steps], marker=marker, **style)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("score on validation (%)")


def side_by_side(sizes: Sequence[int], step: float, reach: float = 0.4) -> list[float]:
    """Spreads points whose sizes are within a tenth of each other, `step` decades apart, in order of size.

    Args:
        reach: limit on the decades from the first to the last of such neighbours.
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


def methods_by_model(settings: Sequence[Setting], file: Path) -> None:
    """Draws a group of bars for each base model, one bar per method."""
    by_method = _by_method(settings)
    width = 0.8 / len(by_method)
    with _scores(file, settings) as (axes,):
        for place, (name, found) in enumerate(by_method.items()):
            aside = (place - (len(by_method) - 1) / 2) * width
            heights, reach = _bars([mean for _, _, mean in found])
            _, style = _style(name)
            axes.bar([group + aside for group, _, _ in found], heights, width, yerr=reach, capsize=3, **style)
        name_ticks(axes.xaxis, [Path(str(setting.value)).name for setting in settings])
        axes.set_xlabel("base model")


def score_against(sweep: str, settings: Sequence[Setting], file: Path) -> None:
    """Draws a line for each method over the swept value; for the prompt's length its step time as well."""
    settings = sorted(settings, key=lambda setting: setting.value)
    values = [setting.value for setting in settings]
    by_method = _by_method(settings)
    timed = sweep == "num_virtual_tokens"
    logarithmic = min(values) > 0
    with _scores(file, settings, panels=2 if timed else 1, height=8.4 if timed else 4.2) as panels:
        for place, (name, found) in enumerate(by_method.items()):
            aside = 0.06 * (place - (len(by_method) - 1) / 2)  # slightly apart, so that the bars do not hide each other
            xs = [values[i] * 2**aside if logarithmic else values[i] + aside for i, _, _ in found]
            _series(panels[0], name, [(x, mean) for x, (_, _, mean) in zip(xs, found)])
            if timed:
                times = [(x, m.step_time_ms) for x, (_, m, _) in zip(xs, found) if m.step_time_ms is not None]
                marker, style = _style(name)
                panels[1].plot([x for x, _ in times], [time for _, time in times], marker=marker, **style)
        for axes in panels:
            if logarithmic:
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
        if timed:
            panels[1].set_ylabel("median step (ms)")
            panels[1].set_ylim(bottom=0)
        panels[-1].set_xlabel(X_LABELS[sweep])


def _by_method(settings: Sequence[Setting]) -> dict[str, list[tuple[int, MethodSummary, Interval]]]:
    """Lists each method's means over all tasks, with the place of the setting and the summary.

    Next to intervals over seeds, those over rows get no bar: they are of another kind, and shorter.
    """
    found: dict[str, list[tuple[int, MethodSummary, Interval]]] = {}
    _, seeds = _title(settings)
    for place, setting in enumerate(settings):
        for method in setting.methods:
            if (mean := method.mean) is not None:
                mean = replace(mean, half_width=None) if mean.of_rows and seeds > 1 else mean
                found.setdefault(method.method, []).append((place, method, mean))
    return found


def _bars(means: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Returns heights in percent, and the lengths of error bars down and up, limited to possible scores."""
    heights = [100 * mean.mean for mean in means]
    halves = [100 * (mean.half_width or 0.0) for mean in means]
    down = [min(half, height - (0 if height >= 0 else -100)) for half, height in zip(halves, heights)]
    return heights, [down, [min(half, 100 - height) for half, height in zip(halves, heights)]]


def _style(name: str) -> tuple[str, dict[str, Any]]:
    """Returns a method's marker, and its colour, line and label: the same in every figure."""
    from matplotlib import colormaps

    place = list(METHODS).index(name)
    # After the first ten come the variants of EPT, whose colours resemble those of others.
    colour, line = (colormaps["tab10"](place), "-") if place < 10 else (colormaps["Dark2"](place - 10), "--")
    return MARKERS[place % len(MARKERS)], {"color": colour, "linestyle": line, "label": METHODS[name].title}


def _series(axes: Any, name: str, points: Sequence[tuple[Any, Interval]], line: bool = True) -> None:
    heights, reach = _bars([mean for _, mean in points])
    marker, style = _style(name)
    style.update(marker=marker, linestyle=style["linestyle"] if line else "", capsize=3)
    axes.errorbar([x for x, _ in points], heights, yerr=reach, **style)


def _title(settings: Sequence[Setting]) -> tuple[str, int]:
    """Says over what a score is averaged; also returns the largest number of seeds."""
    counts = [m.mean.n for setting in settings for m in setting.methods if m.mean]
    least, seeds = min(counts), max(counts)
    tasks = settings[0].tasks
    title = tasks[0] if len(tasks) == 1 else f"mean over {len(tasks)} tasks"
    return f"{title}, {f'{least} to ' if least < seeds else ''}{seeds} seed{'s' if seeds > 1 else ''}", seeds


@contextmanager
def _scores(file: Path, settings: Sequence[Setting], **options: Any) -> Iterator[list[Any]]:
    """Opens a plot whose first panel shows scores, with the methods' names beside it."""
    title, seeds = _title(settings)
    title += f", bars: 95 % interval {'within 0 .. 100' if seeds > 1 else 'of the test rows'}"
    with plot(file, title, legend="beside", **options) as panels:
        yield panels
        majorities = {round(100 * statistics.fmean(s.majority.values()), 6) for s in settings if s.majority}
        if len(majorities) == 1:  # otherwise the settings have different rows
            panels[0].axhline(*majorities, color="tab:gray", linestyle="--", label="commonest label always")
        panels[0].set_ylabel("score on test (%)")
        panels[0].set_ylim(top=min(panels[0].get_ylim()[1], 102))
