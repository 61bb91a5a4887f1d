"""The command line on whole runs: what it prints, where, with which exit code, and what it leaves alone."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import FAMILIES, run_config
from typer.testing import CliRunner, Result

from ept.cli.common import answer
from ept.cli.main import app
from ept.runs.train import train
from ept.tasks import read_rows
from ept.utils.tables import table

GOOD, BAD = "the film was very good", "the long plot was awful"


def ept(*arguments: Any, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def succeed(*arguments: Any, input: str | None = None) -> Result:
    result = ept(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result


def as_json(*arguments: Any) -> Any:
    return json.loads(succeed(*arguments, "--json").stdout)


def refused(*arguments: Any) -> str:
    """Returns the single line on standard error of a command that must fail with exit code 2 and print nothing else."""
    result = ept(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def config_file(no_curves: None, tmp_path: Path, models: dict[str, Path], data: Path) -> Path:
    config = run_config(models["bert"], data, None, "training.max_steps=6", "training.eval_steps=3")
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    return file


def test_train_print_config(config_file: Path, tmp_path: Path) -> None:
    options = ("--set", "seed=5", "--output", tmp_path / "run", "--print-config")
    printed = succeed("train", "--config", config_file, *options)
    values = yaml.safe_load(printed.stdout)
    assert (values["seed"], values["training"]["max_steps"]) == (5, 6)
    assert values["output_dir"] == str(tmp_path / "run")
    again = tmp_path / "again.yaml"
    again.write_text(printed.stdout, encoding="utf-8")
    assert succeed("train", "--config", again, "--print-config").stdout == printed.stdout
    assert as_json("train", "--config", again, "--print-config") == values
    assert not (tmp_path / "run").exists()


def test_train_dry_run(config_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = ("train", "--config", config_file, "--output", tmp_path / "run", "--dry-run")
    arguments += ("--set", "data.max_length=8")
    shown = as_json(*arguments)
    assert shown["rows"] == {"train": 96, "validation": 24, "test": 32}
    assert shown["label_balance"] == {"negative": 0.5, "positive": 0.5}
    assert [example["target"] for example in shown["examples"]] == ["0", "1"]
    assert shown["examples"][0]["text"].startswith("sentence: ")
    assert shown["trainable_parameters"] == 6 * 32 + 2 * (8 + 32) + 1 + 32 * 8 * 2 + 32 * 4 + 2 * 33
    assert 0 < shown["truncation_rate"]["train"] < 1
    text = succeed(*arguments).stdout
    parameters = f"{shown['trainable_parameters']:,}"
    for part in ("example 2", "sentence: ", "negative 50.0%", parameters, "nothing was written"):
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before


def test_train_json_resume_overwrite(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("train", "--config", config_file, "--output", run)
    results = as_json(*arguments)
    assert results == json.loads((run / "results.json").read_text(encoding="utf-8"))
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    assert "already holds a run: --resume continues it, --overwrite deletes it" in refused(*arguments)
    assert "is finished" in refused(*arguments, "--resume")
    assert "exclude each other" in refused(*arguments, "--resume", "--overwrite")
    assert "unknown key trainng" in refused(*arguments, "--overwrite", "--set", "trainng.max_steps=1")
    assert "no such folder" in refused(*arguments, "--overwrite", "--set", "data.data_dir=nowhere")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == written

    shown = succeed(*arguments, "--overwrite").stdout
    assert "accuracy after training" in shown
    assert str(run) in shown.replace("\n", "")


def test_train_resumes_with_the_configuration_of_the_folder(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", "--config", config_file, "--output", run)
    for name in ("results.json", "adapter/adapter_model.safetensors"):
        (run / name).unlink()
    assert as_json("train", "--output", run, "--resume")["steps"] == 6
    elsewhere = tmp_path / "elsewhere"
    assert f"{elsewhere} holds no run to resume" in refused("train", "--output", elsewhere, "--resume")
    assert not elsewhere.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_repeats_the_score_of_training(runs: dict[str, Path], family: str) -> None:
    results = json.loads((runs[family] / "results.json").read_text(encoding="utf-8"))
    found = as_json("evaluate", runs[family])
    assert found["metrics"] == results["test_metrics"]
    assert found["rows"] == 32
    validation = as_json("evaluate", runs[family], "--split", "validation")
    assert validation["metrics"]["accuracy"] == results["best_validation"]
    assert "accuracy" in succeed("evaluate", runs[family]).stdout


def test_evaluate_other_data(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(f"sentence,label\n{GOOD},1\n{BAD},1\n", encoding="utf-8")
    for family in FAMILIES:
        found = as_json("evaluate", runs[family], "--file", file)
        assert (found["rows"], found["metrics"]["accuracy"]) == (2, 0.5), family
    same = as_json("evaluate", runs["t5"], "--data-dir", data)
    assert same["rows"] == 32
    ranked = as_json("evaluate", runs["t5"], "--scoring", "rank")
    assert ranked["metrics"]["unparsable"] == 0


def test_evaluate_other_data_of_a_run_on_a_part_of_its_own(
    no_curves: None, models: dict[str, Path], runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    own = [
        "data.max_length=200",
        f"data.splits={runs['bert']}",
        "data.max_test=5",
        "data.k_shot=8",
        "data.max_train=20",
    ]
    train(run_config(models["bert"], data, tmp_path / "run", "training.max_steps=1", *own))
    shutil.copytree(data, tmp_path / "other")
    with (tmp_path / "other" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"sentence": "film " * 300, "label": 1}) + "\n")  # the model has 128 positions
    found = as_json("evaluate", tmp_path / "run", "--data-dir", tmp_path / "other")
    assert (found["rows"], found["truncation_rate"]) == (33, pytest.approx(1 / 33))
    some = ("--set", "data.max_test=7")
    assert as_json("evaluate", tmp_path / "run", "--data-dir", tmp_path / "other", *some)["rows"] == 7
    assert as_json("evaluate", tmp_path / "run")["rows"] == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_predict(runs: dict[str, Path], tmp_path: Path, family: str) -> None:
    expected = ["positive", "negative"]
    found = as_json("predict", runs[family], GOOD, BAD)
    assert [(row["text"], row["prediction"]) for row in found] == list(zip((GOOD, BAD), expected))
    if family == "t5":  # which generates
        assert set(found[0]) == {"text", "prediction"}
    else:
        assert found[0]["p(positive)"] > 0.5 > found[0]["p(negative)"]
        assert found[0]["p(positive)"] + found[0]["p(negative)"] == pytest.approx(1)
    for column in ("sentence", "text"):
        file = tmp_path / f"{column}.jsonl"
        file.write_text("".join(json.dumps({column: text}) + "\n" for text in (GOOD, BAD)), encoding="utf-8")
        rows = as_json("predict", runs[family], "--file", file)
        assert [{"text": row.pop(column), **row} for row in rows] == found
    lines = succeed("predict", runs[family], GOOD, BAD).stdout.splitlines()
    assert [line.partition("\t")[0] for line in lines] == expected
    lines = succeed("predict", runs[family], "-", input=f"{GOOD}\n{BAD}\n").stdout.splitlines()
    assert [line.partition("\t")[0] for line in lines] == expected


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_predict_keeps_every_row_and_column(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Also rows without text; and a row's answer does not depend on its neighbours."""
    file, output = tmp_path / "rows.csv", tmp_path / f"out.{kind}"
    own = "p(x)"  # a column of the file's own that is called like a probability
    file.write_text(f"id,sentence,note,{own}\n007,{GOOD},a,u\n008,,b,u\n009,{BAD},,u\n010, ,d,u\n", encoding="utf-8")
    shown = succeed("predict", runs["bert"], "--file", file, "--output", output)
    assert "4 rows in" in shown.stdout
    assert "2 of 4 rows get no label: they have no text" in shown.stderr
    rows = read_rows(output)
    assert [row["id"] for row in rows] == ["007", "008", "009", "010"]
    assert {row[own] for row in rows} == {"u"}
    assert [row["note"] or "" for row in rows] == ["a", "b", "", "d"]
    assert [row["prediction"] or None for row in rows] == ["positive", None, "negative", None]
    (alone,) = as_json("predict", runs["bert"], BAD)
    assert float(rows[2]["p(negative)"]) == pytest.approx(alone["p(negative)"], abs=1e-5)
    assert f"{output} exists: --overwrite replaces it" in refused("predict", runs["bert"], GOOD, "--output", output)
    succeed("predict", runs["bert"], GOOD, "--output", output, "--overwrite")
    assert len(read_rows(output)) == 1


def test_predict_writes_columns_of_numbers_and_words(runs: dict[str, Path], tmp_path: Path) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    file.write_text(f'{{"id": 7, "sentence": "{GOOD}"}}\n{{"id": "x", "sentence": "{BAD}"}}\n', encoding="utf-8")
    succeed("predict", runs["bert"], "--file", file, "--output", output)
    assert [row["id"] for row in read_rows(output)] == ["7", "x"]


def test_predict_writes_lists_that_can_be_read_back(runs: dict[str, Path], tmp_path: Path) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.csv"
    parts = ["né", {"a": None}]
    file.write_text(json.dumps({"parts": parts, "sentence": GOOD}) + "\n", encoding="utf-8")
    succeed("predict", runs["bert"], "--file", file, "--output", output)
    assert json.loads(read_rows(output)[0]["parts"]) == parts


def test_bad_input_to_evaluate_and_predict(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["bert"]
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.touch()
    other.write_text('{"headline": "a", "label": 1}\n', encoding="utf-8")
    bad_label = tmp_path / "label.jsonl"
    bad_label.write_text('{"sentence": "a", "label": 7}\n', encoding="utf-8")
    assert "holds no run: there is no config.yaml" in refused("evaluate", tmp_path)
    assert "--split dev: choose one of train, validation, test" in refused("evaluate", run, "--split", "dev")
    both = ("--file", other, "--data-dir", tmp_path)
    assert "--file and --data-dir exclude each other" in refused("evaluate", run, *both)
    assert "7" in refused("evaluate", run, "--file", bad_label)
    assert "give either texts or --file" in refused("predict", run)
    assert "give either texts or --file" in refused("predict", run, GOOD, "--file", other)
    assert "the file is empty" in refused("predict", run, "--file", empty)
    assert "no column sentence and no column text (found: headline, label)" in refused("predict", run, "--file", other)
    assert "unsupported suffix '.xls'" in refused("predict", run, GOOD, "--output", tmp_path / "out.xls")
    taken = tmp_path / "taken.jsonl"
    taken.write_text('{"text": "a", "prediction": 1}\n', encoding="utf-8")
    assert "already has a column 'prediction'" in refused("predict", run, "--file", taken)
    long = " ".join([GOOD] * 5)
    assert "text, row 1: the text has" in refused("predict", run, long, "--set", "data.on_too_long=error")


@pytest.mark.parametrize("arguments", [
    ("train", "glue/sst2", "--model", "m"),
    ("compare", "glue/sst2", "--model", "m"),
    ("predict", "run", GOOD),
    ("export", "run"),
    ("profile", "--shape", "t5-small"),
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, whom permissions do not stop."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: Path(path) != tmp_path and access(path, *how))
    result = ept(*arguments, "--output", tmp_path / "out.csv")
    assert f"{tmp_path} is not writable: give this user the right to write there" in result.stderr
    assert result.exit_code == 1
    assert not [*tmp_path.iterdir()]


def test_json_of_what_json_has_no_form_for(capsys: pytest.CaptureFixture[str]) -> None:
    """For example a Parquet file's dates and empty numbers, in the rows that `predict` returns."""
    answer(True, [{"day": datetime.date(2026, 1, 2), "price": float("nan"), "limits": (1.5, float("inf"))}])
    assert " ".join(capsys.readouterr().out.split()) == (
        '[ { "day": "2026-01-02", "price": null, "limits": [ 1.5, null ] } ]'
    )


def test_a_damaged_adapter_or_none_cannot_be_evaluated(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["bert"], tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in refused("evaluate", run)
    shutil.rmtree(run / "adapter")
    (run / "results.json").unlink()
    assert "has no adapter yet" in refused("evaluate", run)


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_DEBUG", "1")
    result = ept("train", "--config", "nowhere.yaml")
    assert isinstance(result.exception, FileNotFoundError)


def test_tasks(data: Path, models: dict[str, Path]) -> None:
    listed = as_json("tasks")
    assert len(listed) == 13
    assert {"glue/sst2", "glue/rte", "glue/cola", "super_glue/boolq", "super_glue/cb"} <= set(listed)
    assert "glue/sst2" in succeed("tasks").stdout
    shown = as_json("tasks", "show", "glue/sst2", "--data-dir", data, "--labels", "words")
    assert shown["labels"] == {"0": "negative", "1": "positive"}
    assert [example["target"] for example in shown["examples"]] == ["negative", "positive"]
    text = succeed("tasks", "show", "super_glue/boolq").stdout
    assert all(part in text for part in ("{passage}", "accuracy"))
    assert "did you mean 'glue/sst2'" in refused("tasks", "show", "glue/sst")
    assert "did you mean 'glue/sst2'" in refused("train", "glue/sst3", "--model", models["llama"], "--dry-run")


def test_env() -> None:
    report = as_json("env")
    wanted = {"python", "ept", "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
    assert wanted <= set(report["versions"])
    assert report["operators"]["cpu"] == "reference"
    assert report["hardware"]["cores"] >= 1
    text = succeed("env").stdout
    assert all(part in text for part in (report["versions"]["torch"], "reference on cpu"))


def test_a_table_in_a_pipe_breaks_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    header, row = ["method", *("abcdefgh")], ["prompt tuning", *["39,170.5"] * 8]
    answer(False, None, table(header, [row]))
    assert capsys.readouterr().out.count("39,170.5") == 8


def test_a_pipe_whose_reader_has_left_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "ept", "tasks", "--json"], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "")
