"""Whole texts that a run of several text columns is given: answered, and with their end where they are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import VOCABULARY

from ept.runs.config import RunConfig
from ept.runs.evaluation import Answer
from ept.runs.labelling import label_rows, write_rows
from ept.runs.train import prepare
from ept.tasks.template import template_end

Configure = Callable[..., RunConfig]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"film": f"the film {i}", "plot": "so long", "answer": ("good", "bad")[i % 2]} for i in range(40)]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_file(file: Path, *settings: str) -> list[str]:
    return ["data.task=null", "data.data_dir=null", f"data.train_file={file}", "data.label_column=answer", *settings]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_whole_text_is_answered_in_free_text(configure: Configure, file: Path, family: str) -> None:
    columns, metric = "data.text_columns=[film, plot]", "data.metric=[exact_match]"
    free = of_file(file, "data.target_template={answer}", columns, metric, "data.max_answer=3")
    labelled = label_rows(prepare(configure(family, *free)), [{"text": "the film was long"}, {"text": " "}], "text")
    assert [type(row["prediction"]) for row in labelled] == [str, type(None)]


@pytest.mark.parametrize("end", ["\nreview :", " review :", "\n review :\n"])
def test_a_whole_text_keeps_the_end_of_the_template(
    configure: Configure, file: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    words = "data.label_words=[good, bad]"
    run = prepare(configure("llama", *of_file(file, 'data.template="{film} {plot}\\nreview :"', words)))
    read: list[list[int]] = []

    def answer(encoded: Any, progress: Any) -> list[Answer]:
        read.extend(encoded)
        return [Answer(0, (0.5, 0.5))] * len(encoded)

    monkeypatch.setattr(run, "answer", answer)
    texts = ["film " * 40 + end, "the plot" + end, "film " * 40, "review :", "story " * 15 + "{plot}" + end]
    label_rows(run, [{"text": text} for text in texts], "text")
    asked, film = [VOCABULARY["review"], VOCABULARY[":"]], VOCABULARY["film"]
    assert read[0] == [*[film] * 14, *asked]
    assert read[1] == [VOCABULARY["the"], VOCABULARY["plot"], *asked]
    assert read[2] == [film] * 16
    assert read[3] == asked
    assert (read[4][-2:], len(read[4])) == (asked, 16)


def test_the_end_of_a_template() -> None:
    ends = {"{a}": "", "x {a}\nis it?": "\nis it?", "{a} {{b}} {c}: {{d}} e": ": {d} e", "{a}{{": "{"}
    assert {template: template_end(template) for template in ends} == ends


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_numbers_that_json_has_no_sign_for_are_written_as_null(kind: str, tmp_path: Path) -> None:
    """A strict parser refuses `NaN`; a list within a field of csv is JSON, too."""
    file = tmp_path / f"labelled.{kind}"
    write_rows([{"prices": [1.5, float("nan"), float("-inf")]}], file, ())
    assert "[1.5, null, null]" in file.read_text("utf-8")
