"""Answers in free text by the commands: training, scores, report and prediction."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from test_commands import as_json, refused
from tiny_runs import sentence

from ept.tasks.metrics import compute_text_metrics

EXACT = ("--set", "data.metric=[exact_match]")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes sentences with the answers that the tiny models know after "review :", and two rows with gaps."""
    chance = random.Random(5)
    made: list[dict[str, Any]] = [
        {"story": f"sentence : {sentence(chance, i % 2)}", "moral": str(i % 2)} for i in range(120)
    ]
    made += [{"story": "the film", "moral": ""}, {"story": "", "moral": "1"}]
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_learns_to_write(tmp_path: Path, models: dict[str, Path], file: Path, family: str) -> None:
    run = tmp_path / "run"
    options = ("--set", "data.target_template={moral}", "--template", "{story}", *EXACT, "--set", "data.max_answer=4")
    rates = ("--set", "training.low_rank_learning_rate=0.03", "--set", "training.eval_steps=20")
    arguments = ("train", file, "--model", models[family], *options, *rates, "--steps", 40, "--output", run)
    shown = as_json(*arguments, "--dry-run")
    assert (shown["kind"], shown["label_column"], shown["labels"]) == ("free text", "moral", [])
    assert shown["left_out"] == {"no answer": 1, "blank text": 1}
    results = as_json(*arguments)
    assert results["score"] >= 0.9 > results["score_before"]
    assert results["test_metrics"]["loss"] < results["test_metrics_before"]["loss"]
    assert results["test_metrics"].keys() == {"exact_match", "loss"}
    assert not results["verdict"]
    assert "## What the model writes" in (run / "report.md").read_text(encoding="utf-8")
    assert as_json("evaluate", run)["metrics"] == pytest.approx(results["test_metrics"], rel=1e-5)
    answers = as_json("predict", run, "sentence : the film was good", "sentence : the film was bad")
    assert [row["prediction"] for row in answers] == ["1", "0"]


def test_template_and_refusals(models: dict[str, Path], file: Path) -> None:
    written = ("--set", "data.target_template={moral}", *EXACT)
    assert as_json("train", file, "--model", models["t5"], *written, "--dry-run")["template"] == "{story}\nmoral:"
    for options, message in {
        ("--model", models["bert"]): "answers in free text need a language model, and this one is a classifier",
        ("--model", models["t5"], "--set", "training.scoring=rank"): "ranks labels, and the answers are free text",
        ("--model", models["t5"], "--template", "{moral}"): "shows the answer's column 'moral'",
        ("--model", models["t5"], "--set", "data.metric=[accuracy]"): "metric 'accuracy' is not for free text",
        ("--model", models["t5"], "--strict"): "row 121: no answer (column 'moral')",
        ("--model", models["t5"], "--set", "data.label_words=[a, b]"): "target_template and data.label_words exclude",
    }.items():
        assert message in refused("train", file, *written, *options, "--dry-run")


def test_metrics() -> None:
    found = compute_text_metrics(["exact_match"], ["the  cat sat", "a dog"], ["the cat sat", "the dog"])
    assert found == {"exact_match": 0.5}


def test_rouge() -> None:
    pytest.importorskip("rouge_score", reason="the optional package rouge-score is not installed")
    written, right = ["the cat sat", "日本の猫"], ["the cat", "日本の犬"]
    found = compute_text_metrics(["rouge_l", "rouge_1", "rouge_2"], written, right)
    # F of (2 of 3, 2 of 2) and of (3 of 4, 3 of 4); of pairs (1 of 2, 1 of 1) and (2 of 3, 2 of 3)
    assert found == pytest.approx({"rouge_l": (0.8 + 0.75) / 2, "rouge_1": (0.8 + 0.75) / 2, "rouge_2": 2 / 3})


def test_rouge_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"needs the package rouge-score: pip install rouge-score, or set"):
        compute_text_metrics(["rouge_l"], ["a"], ["a"])
