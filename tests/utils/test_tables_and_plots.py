"""Tables print alike in a terminal and on a page; plots are written whole, with nothing cut off."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from rich.console import Console

from ept.utils.plots import name_ticks, plot
from ept.utils.tables import csv_text, markdown, properties, table

HEADER, ROWS = ("method", "s"), [("a|b", "1"), ("prompt tuning", "100")]


def printed(shown: object) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_markdown() -> None:
    assert markdown(HEADER, ROWS) == "| method | s |\n| --- | --- |\n| a\\|b | 1 |\n| prompt tuning | 100 |"
    assert markdown(HEADER, ROWS, aligned=True).splitlines() == [
        "| method        |   s |",
        "|---------------|----:|",
        "| a\\|b          |   1 |",
        "| prompt tuning | 100 |",
    ]


@pytest.mark.parametrize("cell", ["a\rb", "\r", "a\r\n", "a\nb", 'a "b", c', "a\tb", "\r\n", "", " a"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv(cell: str, delimiter: str) -> None:
    text = csv_text(("x", cell), [{"x": cell, cell: "1", "z": 2}, {"x": None, cell: cell}], delimiter)
    assert text.endswith("\n")
    assert not text.endswith("\r\n")
    expected = [["x", cell], [cell, "1"], ["", cell]]
    assert list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)) == expected


def test_terminal() -> None:
    title = "a title that is longer than the table"
    shown = printed(table(HEADER, ROWS, title))
    assert shown[0].strip() == title
    assert any(line.split() == ["│", "a|b", "│", "1", "│"] for line in shown)
    assert any("prompt tuning" in line and "method" not in line for line in printed(properties(ROWS)))


@pytest.mark.parametrize("text", ["[neg]", "[/INST]", "x[red]y.jsonl", "a\\[b]", ":heart:", "[link=x]"])
def test_a_users_text_is_never_read_as_markup(text: str) -> None:
    shown = printed(table((text, "s"), [(text, text)], text))
    assert sum(line.count(text) for line in shown) == 4
    assert text in "".join(printed(properties([("name", text)], text)))


@pytest.mark.parametrize("panels, columns, legend", [(1, 1, "below"), (2, 1, "beside"), (5, 2, "below")])
def test_a_plot_shows_everything(tmp_path: Path, panels: int, columns: int, legend: str) -> None:
    file = tmp_path / "made" / "plot.png"
    with plot(file, "long title " * 20, panels=panels, columns=columns, legend=legend, height=6) as axes:
        assert len(axes) == panels
        for panel in axes:
            panel.plot([1, 2], [3, 4], label="the same line in every panel")
    assert [legend.get_texts()[0].get_text() for legend in axes[0].figure.legends] == ["the same line in every panel"]
    assert [path.name for path in file.parent.iterdir()] == ["plot.png"]
    picture = matplotlib.image.imread(file)[..., :3]
    border = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    assert all((side == 1).all() for side in border), "something is cut off"


@pytest.mark.parametrize("text", ["$bad\\frac$", "$10-$20", "a $x_1$ b", "US$", "\\$5"])
def test_a_users_text_is_never_read_as_a_formula(tmp_path: Path, text: str) -> None:
    with plot(tmp_path / "plot.png", text) as (axes,):
        axes.bar([text, "b"], [1, 2], label=text)
        axes.set_title(text)
        axes.set_ylabel(text)
        axes.set_yticks([1, 2], [text, text])
        axes.text(0, 1, text)
    figure = axes.figure
    assert sum(found.get_text() == text for found in figure.findobj(Text)) >= 8
    assert {found._preprocess_math(text) for found in figure.findobj(Text)} == {(text, False)}


LONG = "The customer is {} with the delivery, the price and the colour of the product"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [
    ["no", "yes"], [LONG.format("unhappy"), LONG.format("happy")], [f"number_{i}_of_the_labels" for i in range(30)],
], ids=["short", "phrases", "many"])  # fmt: skip
def test_names_leave_room_for_the_plot(tmp_path: Path, names: list[str]) -> None:
    size = 1.5 + 0.6 * len(names)
    with plot(tmp_path / "plot.png", width=size + 2, height=size + 1, grid=False) as (axes,):
        axes.imshow([[0] * len(names)] * len(names))
        name_ticks(axes.xaxis, names)
        name_ticks(axes.yaxis, names)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    assert axes.get_window_extent().width > 0.3 * axes.figure.bbox.width


@pytest.mark.filterwarnings("error")
def test_signs_come_from_another_font_or_are_said_to_be_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual, other = (get_font(findfont(FontProperties(name))).get_charmap() for name in (None, "STIXGeneral"))
    sign = chr(min(other.keys() - usual.keys()))
    with plot(tmp_path / "plot.png", sign) as (axes,):
        pass
    assert len(axes.figure._suptitle.get_fontfamily()) == 2
    assert not caplog.messages
    monkeypatch.setattr(fontManager, "ttflist", [])
    with plot(tmp_path / "plot.png", sign):
        pass
    (message,) = caplog.messages
    assert message == f"no installed font has {sign}, which the figures show as boxes: install one"


def test_numbers_of_a_logarithmic_axis_have_exponents(tmp_path: Path) -> None:
    with plot(tmp_path / "plot.png") as (axes,):
        axes.plot([1, 1e6], [1, 2])
        axes.set_xscale("log")
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(labels) > 3
    assert all(label.get_parse_math() for label in labels)


def test_a_failed_plot_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    file.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), plot(file):
        raise ZeroDivisionError
    assert file.read_bytes() == b"old"
