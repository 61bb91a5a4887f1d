"""`ept tasks show`: examples, label balance, and the share of texts that are too long for a tokenizer."""

import json

import datasets
import pytest
from test_commands import as_json, refused, succeed

SHOW_SST2 = ("tasks", "show", "glue/sst2")


def test_with_rows_and_a_tokenizer(tiny):
    data = tiny / "data/glue/sst2"
    shown = as_json(*SHOW_SST2, "--data", data, "--tokenizer", tiny / "t5", "--max-length", 8)
    assert shown["rows"] == {"train": 96, "validation": 24, "test": 32}
    assert shown["label_balance"] == {"negative": 0.5, "positive": 0.5}
    assert [example["target"] for example in shown["examples"]] == ["0", "1"]
    # "sentence : ", 3 to 7 words, one more and an end token, of which 8 have room: from 5 words on it is too long
    texts = [json.loads(line)["sentence"] for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    share = sum(2 + len(text.split()) + 1 > 8 for text in texts) / len(texts)
    assert 0 < share < 1
    assert shown["truncation_rate"]["train"] == pytest.approx(share)
    options = ("--data", data, "--model", tiny / "t5", "--max-length", 8, "--labels", "words")
    text = succeed(*SHOW_SST2, *options).stdout
    for part in ("max length: 8 tokens", f"too long:   train {share:.1%}", "negative 50.0%", "-> 'negative'"):
        assert part in text


def test_rows_from_the_hub(monkeypatch):
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 4} for i in range(20)]
    splits = {"train": rows[:12], "validation": rows[12:]}
    hub = datasets.DatasetDict({name: datasets.Dataset.from_list(found) for name, found in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: hub)
    text = succeed("tasks", "show", "glue/stsb", "--hub").stdout
    assert "labels:     0.0 .. 5.0 in steps of 0.2" in text
    assert "'sentence1: a 1 sentence2: b' -> '0.2'" in text
    assert "0 .. 1 33.3%" in text


def test_the_two_examples_have_different_labels(tmp_path):
    rows = [{"sentence": f"text {i}", "label": label} for i, label in enumerate([1, 1, 1, 0, 1, 0])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = json.dumps({"sentence": "other", "label": 1}) + "\n"
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(held_out.replace("other", split), encoding="utf-8")
    examples = as_json(*SHOW_SST2, "--data", tmp_path)["examples"]
    assert [(e["text"], e["target"]) for e in examples] == [("sentence: text 0", "1"), ("sentence: text 3", "0")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]), encoding="utf-8")
    assert [e["target"] for e in as_json(*SHOW_SST2, "--data", tmp_path)["examples"]] == ["1", "1"]


@pytest.mark.parametrize("arguments, message", [
    (["--tokenizer", "x"], "--tokenizer counts tokens of rows: give --data DIR or --hub as well"),
    (["--data", "x", "--hub"], "--data and --hub exclude each other"),
    (["--labels", "letters"], "--labels letters: choose digits or words"),
    (["--max-length", "0"], "--max-length 0"),
    (["--data", "nowhere"], "nowhere: no such folder"),
])  # fmt: skip
def test_refused(arguments, message):
    assert message in refused(*SHOW_SST2, *arguments)
