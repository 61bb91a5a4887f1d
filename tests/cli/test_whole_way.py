"""The README's commands in sequence, shortened: each command's output is confirmed by another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_commands import succeed

from ept.model.export import EMBEDS_NAME
from ept.tasks import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
FIGURES = ("run/learning_curve.png", "run/confusion.png", "compared/score_against_parameters.png")


@pytest.fixture
def whole_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import whole_way

    yield whole_way
    sys.modules.pop("whole_way")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_whole_way(tmp_path: Path, models: dict[str, Path], data: Path, whole_way: Any, family: str) -> None:
    """A language model on your own file, and a classifier on a folder with splits."""
    source = data
    if family == "llama":
        source = tmp_path / "reviews.jsonl"
        labels = {0: "no", 1: "yes"}
        rows = [{**row, "label": labels[row["label"]]} for row in read_rows(data / "train.jsonl")]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = ("--set", "method.num_virtual_tokens=6", "--set", "method.r=2", "--set", "training.eval_steps=5")
    folder = tmp_path / "way"
    found = whole_way.whole_way(succeed, models[family], source, folder, 5, sizes)
    assert {name: results["steps"] for name, results in found.items()} == {
        "trained": 5, "trained on": 10, "started from it": 5,
    }  # fmt: skip
    if family == "llama":  # a classifier's head starts anew
        assert found["started from it"]["score_before"] == pytest.approx(found["trained on"]["score"])
    for name in FIGURES:
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "commonest label" in (folder / "compared" / "comparison.md").read_text(encoding="utf-8")
    assert (folder / "exported" / EMBEDS_NAME).is_file()
    # The numbers of the report's mistakes lead to their rows.
    report = (folder / "run" / "report.md").read_text(encoding="utf-8")
    mistakes = re.findall(r"^\| (\d+) \| (.*?) \|", report.partition("confident mistakes")[2], re.MULTILINE)
    asked = read_rows(source if source.is_file() else source / "test.jsonl")
    assert bool(mistakes) == (found["trained on"]["test_metrics"]["accuracy"] < 1)
    for number, text in mistakes:
        assert text.startswith(asked[int(number) - 1]["sentence"])
