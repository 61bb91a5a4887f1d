"""Free-text answers through the commands: training, scores, report and prediction."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from test_commands import as_json, refused, succeed
from tiny_runs import sentence
from transformers import AutoTokenizer

from ept.tasks import render
from ept.tasks.chat import chat_task
from ept.tasks.metrics import _Words, compute_text_metrics

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
    options = ("--target-template", "{moral}", "--template", "{story}", *EXACT, "--set", "data.max_answer=4")
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


def test_answers_that_are_cut_are_counted(
    tmp_path: Path, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    file, run = tmp_path / "a.jsonl", tmp_path / "my $run"
    rows = [{"story": f"the film {i}", "moral": "the film was good" if i % 2 else "good"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ("--target-template", "{moral}", *EXACT, "--set", "training.score_before=false", "--steps", 1)
    arguments = ("train", file, "--model", models["llama"], *options, "--output", run)
    shares = as_json(*arguments, "--set", "data.max_answer=4", "--dry-run")["cut_answers"]
    assert 0.4 < shares["train"] < 0.6
    whole = {"train": 0.0, "validation": 0.0, "test": 0.0}  # with its end, the answer has five tokens
    assert as_json(*arguments, "--set", "data.max_answer=5", "--dry-run")["cut_answers"] == whole
    done = succeed(*arguments, "--set", "data.max_answer=4")
    assert "answers of more than data.max_answer=4 tokens are cut, so the model does not learn" in caplog.text
    assert "answers cut (data.max_answer)" in done.stderr
    report = (run / "report.md").read_text(encoding="utf-8")
    assert f"| answers cut, train / test | {shares['train']:.1%} / {shares['test']:.1%} |" in report
    # a name with signs of the shell
    assert "ept predict 'my $run' 'a text'\nept evaluate 'my $run'\nept export 'my $run' --output exported" in report
    again = refused(*arguments, "--set", "data.max_answer=4", "--resume")
    assert f"is finished: `ept evaluate '{run}'` scores it" in again
    shutil.rmtree(run / "adapter")
    assert f"no adapter yet: `ept train --output '{run}' --resume` finishes it" in refused("evaluate", run)


def test_template_and_refusals(models: dict[str, Path], file: Path) -> None:
    written = ("--set", "data.target_template={moral}", *EXACT)
    assert as_json("train", file, "--model", models["t5"], *written, "--dry-run")["template"] == "{story}\nmoral:"
    for options, message in {
        ("--model", models["bert"]): "answers in free text need a language model, but this one is a classifier",
        ("--model", models["t5"], "--set", "training.scoring=rank"): "ranks labels, but the answers are free text",
        ("--model", models["t5"], "--template", "{moral}"): "shows the answer's column 'moral'",
        ("--model", models["t5"], "--set", "data.metric=[accuracy]"): "metric 'accuracy' is not for free text",
        ("--model", models["t5"], "--strict"): "row 121: no answer (column 'moral')",
        ("--model", models["t5"], "--set", "data.label_words=[a, b]"): "target_template and data.label_words exclude",
    }.items():
        assert message in refused("train", file, *written, *options, "--dry-run")


@pytest.fixture(scope="module")
def chat_model(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives the tiny decoder a chat template."""
    folder = shutil.copytree(models["llama"], tmp_path_factory.mktemp("chat") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = "{% for m in messages %}sentence : {{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = "{% if add_generation_prompt %}a {% endif %}" + said
    tokenizer.save_pretrained(folder)
    return folder


def chats(file: Path, rows: int = 120) -> Path:
    chance = random.Random(5)
    made = []
    for i in range(rows):
        asked = [{"role": "user", "content": sentence(chance, i % 2)}]
        made.append({"messages": [*asked, {"role": "assistant", "content": str(i % 2)}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


def test_chats(tmp_path: Path, chat_model: Path) -> None:
    file, run = chats(tmp_path / "a.jsonl"), tmp_path / "run"
    arguments = ("train", file, "--model", chat_model, *EXACT, "--set", "data.max_answer=3", "--output", run)
    shown = as_json(*arguments, "--dry-run")
    assert (shown["kind"], shown["label_column"]) == ("free text", "messages")
    assert [example["target"] for example in shown["examples"]] == ["0", "1"]
    assert shown["examples"][0]["text"].startswith("a sentence : ")
    rates = ("--set", "training.low_rank_learning_rate=0.03", "--steps", 40, "--set", "training.eval_steps=20")
    results = as_json(*arguments, *rates)
    assert results["score"] >= 0.9
    assert as_json("evaluate", run)["metrics"] == pytest.approx(results["test_metrics"], rel=1e-5)
    asked = [[{"role": "user", "content": f"the film was {word}"}] for word in ("good", "bad")]
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in asked), encoding="utf-8"
    )
    answers = as_json("predict", run, "--file", tmp_path / "b.jsonl")
    assert [row["prediction"] for row in answers] == ["1", "0"]
    assert as_json("predict", run, "the film was good")[0]["prediction"] == "1"
    assert as_json("export", run, "--output", tmp_path / "out", "--texts", tmp_path / "b.jsonl")["texts"] == 2


@pytest.mark.parametrize("written", ["conversations", "from", "json"])
def test_chats_in_other_forms(tmp_path: Path, chat_model: Path, written: str) -> None:
    """Under another name, as ShareGPT writes them, and as JSON in the cells of a csv file."""
    given = chats(tmp_path / "given.jsonl")
    made = [json.loads(line)["messages"] for line in given.read_text(encoding="utf-8").splitlines()]
    file, options = tmp_path / "a.jsonl", [*EXACT, "--dry-run"]
    rows: list[dict[str, Any]] = [{"id": i, "conversations": chat} for i, chat in enumerate(made)]
    if written == "from":
        names = {"user": "human", "assistant": "gpt"}
        rows = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in made]
    if written == "json":
        file, options = tmp_path / "a.csv", [*options, "--set", "data.chat_column=conversations"]
        rows = [{"conversations": json.dumps(chat)} for chat in made]
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, ["conversations"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = as_json("train", file, "--model", chat_model, *options)
    assert (shown["kind"], shown["label_column"]) == ("free text", "conversations")
    assert sorted(example["target"] for example in shown["examples"]) == ["0", "1"]
    assert shown["examples"][0]["text"].startswith("a sentence : ")
    given_text = {"".join(example["text"].split()) for example in shown["examples"]}
    assert given_text <= {"".join(f"a sentence : {chat[0]['content']}".split()) for chat in made}


def test_chats_beside_labels_are_no_answers(tmp_path: Path, chat_model: Path) -> None:
    made = [{"conversations": [{"role": "user", "content": "film"}], "label": i % 2} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    said = refused("train", tmp_path / "a.jsonl", "--model", chat_model, "--dry-run")
    assert "column 'conversations', the longest, holds a list, not text" in said


@pytest.mark.parametrize("chat, message", [
    ([{"role": "user", "content": 3}], "row 3: column 'messages': a message is not"),
    ([{"from": ["human"], "value": "a"}], "row 3: column 'messages': a message is not"),
    ([{"role": "assistant", "content": "a"}], "row 3: column 'messages': this chat has no message for the assistant"),
    ([{"role": "user", "content": "film " * 300}, {"role": "assistant", "content": "no"}], "raise data.max_length"),
])  # fmt: skip
def test_chats_refused(tmp_path: Path, chat_model: Path, chat: Any, message: str) -> None:
    file = chats(tmp_path / "a.jsonl", 2)
    with file.open("a", encoding="utf-8") as opened:
        opened.write((json.dumps({"messages": chat}) + "\n") * 5)
    said = refused("train", file, "--model", chat_model, *EXACT, "--dry-run")
    assert message in said
    assert "truncate" not in said


def test_chats_without_a_template(tmp_path: Path, models: dict[str, Path]) -> None:
    file = chats(tmp_path / "a.jsonl")
    message = refused("train", file, "--model", models["llama"], *EXACT, "--dry-run")
    assert "column 'messages' holds chats, but the model's tokenizer has no chat template" in message


@pytest.mark.parametrize("ids, prompt", [([1, 5], "hello"), ([5], "<s>hello")])
def test_the_start_of_a_text_is_written_once(ids: list[int], prompt: str) -> None:
    """If the tokenizer adds it to every text, the template's own is left out."""
    tokenizer = Mock(chat_template="x", bos_token="<s>", bos_token_id=1, return_value={"input_ids": ids})
    tokenizer.apply_chat_template.return_value = "<s>hello"
    task = chat_task("messages", tokenizer, metrics=["exact_match"], max_length=9, name="a")
    assert render(task, {"messages": [{"role": "user", "content": "hello"}]}) == prompt


def test_metrics() -> None:
    found = compute_text_metrics(["exact_match"], ["the  cat sat", "a dog"], ["the cat sat", "the dog"])
    assert found == {"exact_match": 0.5}


def test_rouge() -> None:
    pytest.importorskip("rouge_score", reason="the optional package rouge-score is not installed")
    written, right = ["the cat sat", "日本の猫"], ["the cat", "日本の犬"]
    found = compute_text_metrics(["rouge_l", "rouge_1", "rouge_2"], written, right)
    # F of (2 of 3, 2 of 2) and of (3 of 4, 3 of 4); of pairs (1 of 2, 1 of 1) and (2 of 3, 2 of 3)
    assert found == pytest.approx({"rouge_l": (0.8 + 0.75) / 2, "rouge_1": (0.8 + 0.75) / 2, "rouge_2": 2 / 3})


# a script with marks on its letters, its words
WORDS = [
    ("यह किताब राम की है।", ["यह", "किताब", "राम", "की", "है"]),
    ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
    ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    ("ไม่กิน", ["ไ", "ม่", "กิ", "น"]),  # without spaces between words
    ("မြန်မာ", ["မြ", "န်", "မာ"]),
    ("שָׁלוֹם", ["שָׁלוֹם"]),
    ("Cafe\u0301 ❤\ufe0f naïve_x", ["café", "naïve_x"]),
    ("猫・ガ", ["猫", "ガ"]),
]


@pytest.mark.parametrize("text, words", WORDS)
def test_words_keep_their_marks(text: str, words: list[str]) -> None:
    assert _Words().tokenize(text) == [unicodedata.normalize("NFC", word) for word in words]


def test_other_words_of_the_same_consonants_score_nothing() -> None:
    pytest.importorskip("rouge_score", reason="the optional package rouge-score is not installed")
    found = compute_text_metrics(["rouge_l", "rouge_1"], ["यह कातिब राम का हो"], ["यह किताब राम की है"])
    assert found == pytest.approx({"rouge_l": 2 / 5, "rouge_1": 2 / 5})


def test_how_a_letter_is_composed_makes_no_difference() -> None:
    assert compute_text_metrics(["exact_match"], ["cafe\u0301"], ["caf\u00e9"]) == {"exact_match": 1.0}


def test_rouge_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"needs the package rouge-score: pip install rouge-score, or set"):
        compute_text_metrics(["rouge_l"], ["a"], ["a"])
