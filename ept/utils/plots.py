"""Plots: one size, style and legend for all, written as PNG files that appear whole."""

from __future__ import annotations

import contextlib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import write_atomically

logger = logging.getLogger(__name__)

LINE, LINES = 24, 3  # of a name beside an axis: characters per line, and maximum number of lines


@contextlib.contextmanager
def plot(
    file: Path,
    title: str = "",
    *,
    panels: int = 1,
    columns: int = 1,
    width: float = 7.0,
    height: float = 4.2,
    legend: str = "below",
    legend_columns: int = 3,
    dpi: int = 150,
    grid: bool = True,
) -> Iterator[list[Any]]:
    """Yields the axes of a new figure, and writes the figure to `file` as a PNG at the end of the block.

    All axes get a `grid`, and the figure one legend with every label once. Long titles are wrapped. Text is shown as
    written: a dollar sign does not start a formula.

    Args:
        panels: number of axes, in `columns` from left to right; in a single column they share the x axis.
        width, height: of the figure, in inches.
        legend: "below" the axes, in `legend_columns`, or "beside" them.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and may look for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    subplots = figure.subplots(-(-panels // columns), columns, sharex=columns == 1, squeeze=False)
    axes = list(subplots.flat)
    for unused in axes[panels:]:
        unused.remove()
    yield axes[:panels]
    labelled: dict[str, Any] = {}
    for panel in axes[:panels]:
        if grid:
            panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.title.set_fontsize("medium")
        for handle, label in zip(*panel.get_legend_handles_labels()):
            labelled.setdefault(label, handle)
    if title:
        figure.suptitle(textwrap.fill(title, int(10.5 * width)), fontsize="medium")  # characters that fit into an inch
    if labelled:
        places: dict[str, Any] = {"below": "outside lower center", "beside": "outside center right"}
        style: dict[str, Any] = {"ncols": legend_columns if legend == "below" else 1, "frameon": False}
        figure.legend(labelled.values(), labelled, loc=places[legend], fontsize="small", **style)
    _show_as_written(figure)
    _take_fonts(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    # "tight" enlarges the picture if a label or the legend would be cut off. Without the software's version, two
    # machines write the same bytes.
    options: dict[str, Any] = {"dpi": dpi, "bbox_inches": "tight", "metadata": {"Software": None}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # `_take_fonts` already warns of these
        write_atomically(file, lambda path: figure.savefig(path, format="png", **options))


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Puts names at 0, 1, … of an axis: wrapped, the longest ones cut, and slanted below an x axis."""
    wrapped = [textwrap.wrap(name, LINE, max_lines=LINES, placeholder=" …") for name in names]
    axis.set_ticks(range(len(names)), ["\n".join(lines) for lines in wrapped])
    if axis.axis_name == "x" and max((len(line) for lines in wrapped for line in lines), default=0) > 8:
        for label in axis.get_ticklabels():
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")


def _take_fonts(figure: Any) -> None:
    """Takes characters that the default font lacks, such as Chinese ones, from other installed fonts."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    signs = {ord(sign) for text in texts for sign in text.get_text() if not sign.isspace()}
    missing = signs - get_font(findfont(FontProperties())).get_charmap().keys()
    families = []
    for font in fontManager.ttflist if missing else ():
        with contextlib.suppress(OSError, RuntimeError):  # a missing file, or a font that cannot be used
            found = missing & get_font(font.fname).get_charmap().keys()
            if found and "Last Resort" not in font.name:  # it has a box for every character
                missing -= found
                families.append(font.name)
    for text in texts if families else ():
        text.set_fontfamily(["sans-serif", *families])
    if missing:
        logger.warning("no installed font has %s, which the figures show as boxes: install one", chr(min(missing)))


def _show_as_written(figure: Any) -> None:
    """Turns formulas off in all text except the numbers of logarithmic axes, which matplotlib writes as formulas."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatterMathtext

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            for label in axis.get_ticklabels(which="both"):
                label.set_parse_math(True)
