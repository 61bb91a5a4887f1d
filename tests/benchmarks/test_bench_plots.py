"""Plots of records and of profiles: as many points as a full report has, the longest titles, and nothing clipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from profile_records import kernel_row, profiled

from benchmarks import plots, shapes
from benchmarks.record import profile_row
from ept.profile.report import draw_phases, draw_sweep


def kernel_rows() -> list[dict[str, Any]]:
    """Returns every case of a full report, measured by nobody."""
    ceilings = {"bytes_per_second": 4.3e12}
    return [
        kernel_row(
            case, provider, place, 1000 * sum(case.size.values()), bytes_per_second=4e12 / place, ceilings=ceilings
        )
        for case in shapes.gpu_cases()
        for place, provider in enumerate(case.providers, 1)
    ]


FOUR = [("pt", 100, 12345.6), ("dept", 60, 9000.0), ("ept", 40, 7000.0), ("peft-pt", 100, 13e3)]
MANY = [(name, tokens, 100.0 + tokens) for name, _, _ in FOUR for tokens in (10, 20, 40, 60, 100)]
CASES = [f"{case}, padded to {padding}" for case in ("smollm2-headlines", "t5") for padding in ("a", "b")]
STEPS = [
    {**profile_row(method, profiled(*FOUR)), "section": "steps", "status": "ok", "case": case}
    for case in CASES
    for method in profiled(*FOUR)["methods"]
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figures that are saved, as they are at that moment."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


DRAW = {
    "bandwidth": lambda path: plots.draw_bandwidth(kernel_rows(), path),
    "speedup": lambda path: plots.draw_speedup(kernel_rows(), path),
    "steps": lambda path: plots.draw_steps(STEPS, path),
    "phases": lambda path: draw_phases(profiled(*FOUR), path),
    "phases of many": lambda path: draw_phases(profiled(*MANY), path),
    "sweep": lambda path: draw_sweep(profiled(*MANY), path),
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_clipped_and_everything_is_named(name: str, drawn: list[Figure], tmp_path: Path) -> None:
    DRAW[name](tmp_path / "plot.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    box = figure.get_tightbbox()  # inches, of all that is drawn
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_title() or figure.get_suptitle()
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    named = {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}
    assert shown == named


def test_no_two_lines_of_a_plot_look_alike(drawn: list[Figure], tmp_path: Path) -> None:
    plots.draw_speedup(kernel_rows(), tmp_path / "plot.png")
    for axes in drawn[0].axes:
        looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]
        assert len(looks) == len(set(looks)) > 15
