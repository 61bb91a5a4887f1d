"""From a user's file to a run, in one command: every kind of file, and how it is understood."""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_commands import as_json, ept, refused, succeed
from tiny_runs import sentence

from ept.cli.common import encoding_of
from ept.tasks import read_rows, sources

Rows = list[dict[str, Any]]
WORDS = ("no", "yes")


def reviews(count: int = 60, **columns: Callable[[int], Any]) -> Rows:
    """Makes rows {review, liked}, the last word of a review says which; `columns` change or add cells of row i."""
    chance = random.Random(3)
    rows: Rows = [{"review": sentence(chance, i % 2), "liked": WORDS[i % 2]} for i in range(count)]
    return [{**row, **{name: cell(i) for name, cell in columns.items()}} for i, row in enumerate(rows)]


def as_csv(rows: Rows, delimiter: str = ",", **options: Any) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter, lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


SHARES = (["no"] * 7 + ["yes"] * 2 + ["a"]) * 6
TEXT = reviews()
HALVES = {"no": 0.5, "yes": 0.5}
# kind: name of the file, its content, what a dry run says beside the usual
KINDS: dict[str, tuple[str, str | bytes, dict[str, Any]]] = {
    "comma": ("a.csv", as_csv(TEXT), {}),
    "semicolon": ("a.csv", as_csv(reviews(review=lambda i: f"so, so, {i}"), ";"), {}),
    "tab": ("a.tsv", as_csv(TEXT, "\t"), {}),
    "byte order mark": ("a.csv", "\ufeff" + as_csv(TEXT), {}),
    "cp1252": ("a.csv", as_csv(reviews(review=lambda i: f"très bien, 5 € {i}")).encode("cp1252"), {}),
    "quoted line breaks": ("a.csv", as_csv(reviews(review=lambda i: f'two\nlines, "{i}"')), {}),
    "jsonl": ("a.jsonl", as_jsonl(TEXT), {}),
    "json": ("a.json", json.dumps({"data": TEXT}), {}),
    "70/20/10 %": (
        "a.csv",
        as_csv(reviews(liked=lambda i: SHARES[i])),
        {"labels": ["a", "no", "yes"], "metrics": ["accuracy", "f1_macro"], "label_balance": None},
    ),
    "numbers": ("a.csv", as_csv(reviews(liked=lambda i: i % 3)), {"labels": ["0", "1", "2"], "label_balance": None}),
    "booleans": ("a.jsonl", as_jsonl(reviews(liked=lambda i: i % 2 == 0)), {"labels": ["false", "true"]}),
    "whole floats": ("a.csv", as_csv(reviews(liked=lambda i: float(i % 2))), {"labels": ["0", "1"]}),
    "missing labels": (
        "a.csv",
        as_csv(reviews(liked=lambda i: WORDS[i % 2] if i > 3 else "")),
        {"left_out": {"no label": 4}, "rows": None},
    ),
    "labels left out": (
        "a.jsonl",
        as_jsonl([row if i > 3 else {"review": row["review"]} for i, row in enumerate(TEXT)]),
        {"left_out": {"no label": 4}, "rows": None},
    ),
    "texts left out": (
        "a.jsonl",
        as_jsonl([row if i > 3 else {"liked": row["liked"]} for i, row in enumerate(TEXT)]),
        {"left_out": {"blank text": 4}, "rows": None},
    ),
    "blank texts": (
        "a.csv",
        as_csv([{"review": " " if i < 4 else row["review"], "liked": row["liked"]} for i, row in enumerate(TEXT)]),
        {"left_out": {"blank text": 4}, "rows": None},
    ),
    "duplicated rows": ("a.csv", as_csv(TEXT + TEXT), {"rows": None}),
    "emoji and Japanese": (
        "a.csv",
        as_csv(reviews(review=lambda i: f"最高 🎉 {i}", liked=lambda i: "良い悪い"[2 * (i % 2) :][:2])),
        {"labels": ["悪い", "良い"]},
    ),
    "longer than the limit": (
        "a.csv",
        as_csv(reviews(review=lambda i: f"very {i} " * 200)),
        {"truncation_rate": None, "template": "{review}\nliked:"},
    ),
    "two columns only": ("a.csv", as_csv([{"a": row["review"], "b": row["liked"]} for row in TEXT]), {
        "text_columns": ["a"], "label_column": "b", "template": "{a}",
    }),
    "further columns": (
        "a.csv",
        as_csv(reviews(id=lambda i: i, user=lambda i: f"user {i}")),
        {},
    ),
    "a regression": (
        "a.csv",
        as_csv(reviews(liked=lambda i: i / 4)),
        {"kind": "regression", "metric": "pearson", "labels": None, "label_balance": None},
    ),
}  # fmt: skip
USUAL = {
    "text_columns": ["review"], "label_column": "liked", "template": "{review}", "kind": "classification",
    "labels": ["no", "yes"], "metric": "accuracy", "rows": {"train": 48, "validation": 6, "test": 6}, "left_out": {},
    "truncation_rate": {"train": 0.0, "validation": 0.0, "test": 0.0},
}  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    name, content, _ = KINDS[kind]
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_understands(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    file = write(tmp_path, kind)
    # The tiny BERT has positions for 128 tokens, its prompt among them, and cuts texts there.
    model = models["llama" if kind == "longer than the limit" else "bert"]
    shown = as_json("train", file, "--model", model, "--dry-run")
    expected = {**USUAL, **KINDS[kind][2]}
    wanted = {key: value for key, value in expected.items() if value is not None}
    assert {key: shown[key] for key in wanted} == wanted
    assert sorted(tmp_path.iterdir()) == [file]
    assert sum(shown["rows"].values()) == {"duplicated rows": 120}.get(kind, 60) - sum(shown["left_out"].values())
    if kind == "longer than the limit":
        assert shown["truncation_rate"]["train"] == 1.0


def test_f1_is_that_of_the_second_label(no_curves: None, tmp_path: Path, models: dict[str, Path]) -> None:
    arguments = ("train", write(tmp_path, "comma"), "--model", models["bert"], "--set", "data.metric=[f1, accuracy]")
    arguments = (*arguments, "--set", "data.max_length=64", "--output", tmp_path / "run", "--method", "pt")
    assert "│ f1 of 'yes', accuracy, the first decides" in succeed(*arguments, "--dry-run").output
    others = ("--set", "data.label_words=['yes', 'no']", "--steps", 1)
    assert "f1 of 'no' after training" in succeed(*arguments, *others).output
    assert "f1 of 'no'" in succeed("evaluate", tmp_path / "run").output


def test_a_file_is_read_once(
    no_curves: None, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For inferring options from its rows, and for the splits."""
    read = []
    monkeypatch.setattr(sources, "read_rows", lambda path, *rest: read.append(path) or read_rows(path, *rest))
    file = write(tmp_path, "comma")
    arguments = ("train", file, "--model", models["bert"], "--method", "pt")
    succeed(*arguments, "--dry-run")
    assert read == [file]
    succeed(*arguments, "--steps", 1, "--output", tmp_path / "run")
    assert read == [file, file]


def test_one_class_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(as_csv(reviews(liked=lambda i: "yes")), encoding="utf-8")
    for option in ((), ("--dry-run",)):
        message = refused("train", file, "--model", models["bert"], "--output", tmp_path / "run", *option)
        assert "a.csv: column 'liked' holds only one label, 'yes': a task needs at least 2" in message
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("head, task", [("TokenClassification", "TOKEN_CLS"), ("QuestionAnswering", "QUESTION_ANS")])
def test_heads_for_tokens_are_refused(tmp_path: Path, models: dict[str, Path], head: str, task: str) -> None:
    """A run would silently put another head in their place."""
    model = shutil.copytree(models["bert"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "architectures": [f"BertFor{head}"]}), encoding="utf-8")
    arguments = ("train", write(tmp_path, "comma"), "--model", model, "--dry-run")
    message = refused(*arguments)
    assert f"is a BertFor{head}, but a run trains SEQ_2_SEQ_LM, CAUSAL_LM, SEQ_CLS: use get_ept_model" in message
    assert f"and the Trainer for {task}, or set" in message
    assert "expected one of SEQ_2_SEQ_LM, CAUSAL_LM, SEQ_CLS" in refused(*arguments, "--set", f"model.task_type={task}")
    assert as_json(*arguments, "--set", "model.task_type=SEQ_CLS")["task_type"] == "SEQ_CLS"


def test_a_file_with_gaps_is_refused_where_one_asks_for_that(tmp_path: Path, models: dict[str, Path]) -> None:
    for kind, message in {"missing labels": "row 1: label ''", "blank texts": "row 1: empty text"}.items():
        file = write(tmp_path, kind)
        assert message in refused("train", file, "--model", models["bert"], "--dry-run", "--strict")


@pytest.mark.parametrize("family, kind", [("bert", "70/20/10 %"), ("llama", "semicolon"), ("t5", "jsonl")])
def test_training_in_one_command(
    no_curves: None, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, kind)
    name = KINDS[kind][0]
    done = succeed("train", name, "--model", models[family], "--steps", 4, "--method", "pt")
    run = tmp_path / "runs" / f"a-{datetime.date.today()}"
    assert f"saved in runs/{run.name}" in done.stdout
    assert "'no', 'yes'" in done.stderr  # shown before training
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert (results["task"], results["method"], results["steps"]) == ("a", "pt", 4)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    assert config["template"] == ("{review}" if family == "bert" else "{review}\nliked:")
    words = ["a", "no", "yes"] if family == "bert" else ["no", "yes"]
    assert config["label_words"] == dict(zip(words, words))
    assert config["metric"] == results["config"]["data"]["metric"]
    assert as_json("evaluate", run)["metrics"] == results["test_metrics"]
    (row,) = as_json("predict", run, "the film was good")
    assert row["prediction"] in (*config["label_words"], None)
    # Repeating it uses a new folder; a changed file is reported.
    again = ept("train", name, "--model", models[family], "--steps", 1, "--method", "pt")
    assert f"saved in runs/{run.name}-2" in again.stdout
    lines = (tmp_path / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / name).write_text("".join(lines[:-1]), encoding="utf-8")
    assert "the train data have changed since these splits were drawn" in refused("evaluate", run)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shuffled_labels_are_no_gain(no_curves: None, tmp_path: Path, models: dict[str, Path], family: str) -> None:
    """Each review has a random label, so that whatever is learned does not hold on test."""
    chance, file = random.Random(8), tmp_path / "a.csv"
    file.write_text(as_csv(reviews(400, liked=lambda i: chance.choice(WORDS))), encoding="utf-8")
    options = ("--steps", 30, "--output", tmp_path / "run", "--set", "training.eval_steps=10")
    done = ept("train", file, "--model", models[family], *options)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["verdict"] is not None
    said = " ".join(done.stdout.split())
    assert f"On test the model {results['verdict']}" in said
    assert done.exit_code == 0


def test_two_templates_share_their_test_rows(no_curves: None, tmp_path: Path, models: dict[str, Path]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(as_csv(reviews(title=lambda i: f"the {i % 7}")), encoding="utf-8")
    drawn = []
    for number, template in enumerate(("{review}", "{title}: {review}\\nWell?")):
        run = tmp_path / str(number)
        options = ("--template", template, "--label-column", "liked", "--steps", 1, "--output", run, "--method", "pt")
        succeed("train", file, "--model", models["bert"], *options)
        drawn.append(json.loads((run / "splits.json").read_text(encoding="utf-8")))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]["test"]["rows"]) == 6
    # A run may be given the splits of another one.
    given = ("--set", f"data.splits={tmp_path / '0'}", "--set", "data.max_test=3", "--label-column", "liked")
    succeed(
        "train", file, "--model", models["bert"], "--steps", 1, "--method", "pt", "--output", tmp_path / "2", *given
    )
    third = json.loads((tmp_path / "2" / "splits.json").read_text(encoding="utf-8"))
    assert third["train"] == drawn[0]["train"]
    assert set(third["test"]["rows"]) < set(drawn[0]["test"]["rows"])
    missing = ("--set", f"data.splits={tmp_path}", "--label-column", "liked")
    assert "no such file" in refused("train", file, "--model", models["bert"], "--dry-run", *missing)


def test_options_and_their_keys(tmp_path: Path, models: dict[str, Path]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(as_csv(reviews(title=lambda i: "plot", mood=lambda i: WORDS[i % 2])), encoding="utf-8")
    arguments = ("train", file, "--model", models["llama"], "--dry-run")
    columns = ("--text-column", "title", "--text-column", "review", "--label-column", "mood")
    assert as_json(*arguments, *columns)["template"] == "title: {title} review: {review}\nmood:"
    shown = as_json(
        *arguments, "--template", "{review}\\nGood?", "--label-column", "mood", "--set", "data.labels=digits"
    )
    assert (shown["template"], shown["labels"]) == ("{review}\nGood?", ["0", "1"])
    assert as_json(*arguments, "--label-column", "mood", "--set", "data.template={review}")["template"] == "{review}"
    assert "'liked', 'mood' could each be the label" in refused(*arguments)
    both = ("--template", "{review}", "--text-column", "review")
    assert "data.template and data.text_columns exclude each other" in refused(*arguments, *both)
    printed = as_json("train", file, "--print-config", "--method", "dept", "--steps", 7, "--strict")
    assert (printed["method"]["name"], printed["training"]["max_steps"], printed["data"]["strict"]) == ("dept", 7, True)


@pytest.mark.parametrize("name, key", [
    ("glue/sst2", "task"), ("folder", "data_dir"), ("owner/reviews", "hub"), ("owner/reviews:plain", "hub"),
])  # fmt: skip
def test_what_a_name_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert as_json("train", name, "--print-config")["data"][key] == name


def test_a_run_is_used_from_any_folder(
    no_curves: None, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and model names given to a run are relative to the folder in which it was started."""
    shutil.copytree(models["bert"], tmp_path / "own" / "bert")
    (tmp_path / "own" / "a.csv").write_text(as_csv(TEXT), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "own")
    short = ("--model", "bert", "--method", "pt", "--output", "run")
    succeed("train", "a.csv", *short, "--steps", 1)
    answers = as_json("predict", "run", "the film was good")
    monkeypatch.chdir(tmp_path)
    assert as_json("predict", "own/run", "the film was good") == answers
    assert as_json("evaluate", "own/run")["rows"] == 6
    succeed("train", "--resume", "--output", "own/run", "--steps", 2)
    monkeypatch.chdir(tmp_path / "own")
    succeed("train", "a.csv", *short, "--steps", 3, "--resume")  # what was given then, once more


@pytest.mark.parametrize("name, message", [
    ("nowhere.csv", "nowhere.csv: no such file"), ("./nowhere", "./nowhere: no such file or folder"),
    ("a/b/c", "a/b/c: no such file or folder"), ("b.xlsx", "b.xlsx: no such file"),
])  # fmt: skip
def test_a_path_to_nothing(models: dict[str, Path], name: str, message: str) -> None:
    assert message in refused("train", name, "--model", models["bert"], "--dry-run")


@pytest.mark.parametrize("where", ["test", "validation", "evaluate"])
def test_numbers_are_no_labels_in_words(tmp_path: Path, models: dict[str, Path], where: str) -> None:
    """The numbers' words are unknown: a dataset's order is not alphabetical."""
    numbered = as_csv(reviews(20, liked=lambda i: i % 2))
    (tmp_path / "train.csv").write_text(as_csv(TEXT), encoding="utf-8")
    (tmp_path / f"{where}.csv").write_text(numbered, encoding="utf-8")
    given = ("--model", models["bert"], "--method", "pt", "--output", tmp_path / "run")
    if where == "evaluate":
        (tmp_path / "evaluate.csv").rename(tmp_path / "own.csv")
        succeed("train", tmp_path / "train.csv", *given, "--steps", 1)
        said = refused("evaluate", tmp_path / "run", "--file", tmp_path / "own.csv")
    else:
        said = refused("train", tmp_path, *given, "--dry-run")
    assert "row 1: label '0' (column 'liked') is outside the set: allowed are 'no', 'yes'; write the word" in said
    if where == "test":
        mapping = "data.label_words={'no': 'no', 'yes': 'yes', 0: 'no', 1: 'yes'}"
        assert as_json("train", tmp_path, *given, "--set", mapping, "--dry-run")["rows"]["test"] == 20


def test_a_hub_data_set_is_labelled_by_its_names(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    rows = {"text": [row["review"] for row in TEXT], "label": [i % 2 for i in range(60)]}
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or loaded)
    shown = as_json("train", "owner/reviews:plain", "--model", models["bert"], "--dry-run")
    assert (shown["labels"], shown["rows"]["test"]) == (["no", "yes"], 6)
    assert asked == [("owner/reviews", "plain")]


def test_evaluate_a_file_with_other_columns(no_curves: None, tmp_path: Path, models: dict[str, Path]) -> None:
    file, other, run = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "run"
    file.write_text(as_csv(TEXT), encoding="utf-8")
    renamed = [{"what": row["review"], "how": row["liked"]} for row in TEXT]
    other.write_text(as_csv([*renamed, {"what": "fine", "how": ""}], ";"), encoding="utf-8")
    succeed("train", file, "--model", models["bert"], "--steps", 1, "--method", "pt", "--output", run)
    columns = ("--text-column", "what", "--label-column", "how")
    found = as_json("evaluate", run, "--file", other, *columns)
    assert found["rows"] == 60
    assert found["metrics"] == as_json("evaluate", run, "--file", file)["metrics"]
    assert "row 61: label ''" in refused("evaluate", run, "--file", other, *columns, "--strict")
    answers = as_json("predict", run, "--file", other, "--text-column", "what")
    own = as_json("predict", run, "--file", file)
    assert [row["prediction"] for row in answers[:-1]] == [row["prediction"] for row in own]
    assert answers[0].keys() >= {"what", "how", "prediction"}
    other.write_text("what;how\n ;no\nfine " + "very " * 300 + ";yes\n", encoding="utf-8")
    told = refused("predict", run, "--file", other, "--text-column", "what", "--set", "data.on_too_long=error")
    assert "b.csv, row 2: the text has" in told
    assert "no column which" in refused("predict", run, "--file", other, "--text-column", "which")
    assert "rename one, or name it with --text-column" in refused("predict", run, "--file", other)
    told = refused("evaluate", run, "--file", other, "--text-column", "what")
    assert "rename the column or name it with --label-column (data.label_column)" in told
    other.write_bytes("what;how\nПривет;no\nМир;yes\n".encode("cp1251"))
    options = ("--file", other, *columns)
    assert "it may be" in refused("evaluate", run, *options)
    named = ("--set", "data.encoding=cp1251")
    assert as_json("evaluate", run, *options, *named)["rows"] == 2
    assert "no column 'how2'" in refused(
        "evaluate", run, *options[:2], "--label-column", "how2", "--set", "data.encoding=cp1251"
    )


def test_columns_that_are_not_read_are_shown(tmp_path: Path, models: dict[str, Path]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(as_csv(reviews(title=lambda i: f"title {i}", n=lambda i: i)), encoding="utf-8")
    command = ("train", file, "--model", models["bert"], "--dry-run", "--text-column", "review")
    assert as_json(*command, "--label-column", "liked")["unread_columns"] == ["title", "n"]
    assert "columns not read" in succeed(*command, "--label-column", "liked").stdout
    named = (*command, "--label-column", "liked", "--text-column", "title", "--text-column", "n")
    assert "columns not read" not in succeed(*named).stdout


def test_compare_on_ones_own_file(tmp_path: Path, models: dict[str, Path]) -> None:
    file = write(tmp_path, "comma")
    shown = as_json("compare", file, "--model", models["bert"], "--output", tmp_path / "c", "--steps", 3, "--dry-run")
    assert len(shown["runs"]) == 12  # four methods, three seeds
    data = [run["config"]["data"] for run in shown["runs"]]
    assert {(d["template"], d["label_column"], *d["label_words"], *d["metric"]) for d in data} == {
        ("{review}", "liked", "no", "yes", "accuracy")
    }
    assert shown["runs"][0]["run"].startswith("pt a ")


@pytest.mark.parametrize(
    "given, encoding",
    [
        (None, None),
        (["data.strict=true"], None),
        (["data.encoding=cp1250", "data.encoding=cp1252"], "cp1252"),
        ([" data.encoding = cp1252"], "cp1252"),
        (["data.encoding='cp1252'"], "cp1252"),
        (["data.encoding=cp1252", "data.encoding=null"], None),
    ],
)
def test_the_encoding_of_another_file_is_read_as_any_other_setting(given, encoding):
    assert encoding_of(given) == encoding
