"""Tables print alike in a terminal and on a page; plots are written whole, with nothing cut off."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from ept.utils.plots import plot
from ept.utils.tables import markdown, properties, table

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


def test_a_failed_plot_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    file.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), plot(file):
        raise ZeroDivisionError
    assert file.read_bytes() == b"old"
