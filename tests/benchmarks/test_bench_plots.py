"""Plots of records and of profiles: as many points as a full report has, the longest titles, and nothing clipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import plots, shapes
from benchmarks.json_records import step_rows
from ept.profile.clock import PHASES
from ept.profile.report import draw_phases, draw_sweep

SHARES = (0.01, 0.01, 0.4, 0.5, 0.02, 0.06)  # of the phases of a step


def kernel_rows() -> list[dict[str, Any]]:
    """Every case of a full report, measured by nobody."""
    rows = []
    for case in shapes.gpu_cases():
        moved = 1000 * sum(case.size.values())
        for place, provider in enumerate(case.providers, 1):
            rows.append(
                {
                    "section": "kernels",
                    "status": "ok",
                    "case": case.id,
                    "kernel": case.kernel,
                    "size": case.size,
                    "dtype": case.dtype,
                    "scheme": case.scheme,
                    "provider": provider,
                    "backend": "triton",
                    "median": float(place),
                    "bytes": moved,
                    "bytes_per_second": 4e12 / place,
                    "ceilings": {"bytes_per_second": 4.3e12},
                }
            )
    return rows


def method(name: str, tokens: int, time: float) -> dict[str, Any]:
    """A method as `ept profile` records it; milliseconds."""
    return {
        "method": name,
        "num_virtual_tokens": tokens,
        "trainable_parameters": 76_800,
        "tokens_per_second": 1e3,
        "peak_memory_bytes": 1 << 30,
        "step_ms": {"median": time, "p20": 0.9 * time, "p80": 1.3 * time, "samples": [time]},
        "phases_ms": {phase: time * share for phase, share in zip(PHASES, SHARES)},
    }


def profiled(methods: list[dict[str, Any]], padding: str = "max_length") -> dict[str, Any]:
    return {
        "case": "smollm2-headlines",
        "model": {"name": "llama-3.2-1b (random weights)", "layers": 12, "dtype": "bfloat16", "quantization": None},
        "data": {"padding": padding},
        "batch": 32,
        "length": 1024,
        "device": "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "peak_memory_kind": "none",
        "methods": methods,
    }


FOUR = [method("pt", 100, 12345.6), method("dept", 60, 9000.0), method("ept", 40, 7000.0), method("peft-pt", 100, 13e3)]
MANY = [method(m["method"], n, 100.0 + n) for m in FOUR for n in (10, 20, 40, 60, 100)]
CASES = [{**profiled(FOUR, padding), "case": case} for case in ("smollm2-headlines", "t5") for padding in ("a", "b")]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as they are at that moment."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


DRAW = {
    "bandwidth": lambda path: plots.draw_bandwidth(kernel_rows(), path),
    "speedup": lambda path: plots.draw_speedup(kernel_rows(), path),
    "steps": lambda path: plots.draw_steps(step_rows({"cases": CASES}), path),
    "phases": lambda path: draw_phases(profiled(FOUR), path),
    "phases of many": lambda path: draw_phases(profiled(MANY), path),
    "sweep": lambda path: draw_sweep(profiled(MANY), path),
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
