"""A run's data beside its model: texts longer than its positions, texts it cannot read, numbers that are classes."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from tiny_runs import OTHER
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ept.runs.config import DataConfig, RunConfig
from ept.runs.data import load_run_data, resolved
from ept.runs.summary import run_summary, summary_table
from ept.runs.train import prepare, train

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("method, room", [("ept", 122), ("prompt-tuning", 122), ("lora", 128)])
def test_texts_are_cut_to_what_the_model_has_positions_for(
    configure: Configure, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, room: int
) -> None:
    long = {"sentence": " ".join(["film"] * 300), "label": 1}
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    sizes = [] if method == "ept" else ["method.r=null"]
    sizes += ["method.num_virtual_tokens=null"] if method == "lora" else []
    own = [f"data.data_dir={tmp_path / 'data'}", "data.max_length=200", f"method.name={method}", *sizes]
    run = prepare(configure("bert", *own))
    assert run.max_length == max(map(len, run.run_data.data.train["text_ids"])) == room
    assert 0 < run.run_data.truncation_rate["train"] < 0.1
    assert f"positions for {room} tokens of text: this is the limit, not data.max_length=200" in caplog.text
    assert run.predict([row.ids for row in run.fit([long], "test")])[0] in (0, 1)


@pytest.mark.parametrize("settings, answer", [
    (["data.label_words=['no', 'very yes']"], 2),
    (["data.label_words=['no', 'very yes']", "training.scoring=generate"], 2),
    (["data.target_template=very very {label}", "data.max_answer=9"], 9),
])  # fmt: skip
def test_a_decoder_keeps_positions_for_its_answers(
    configure: Configure, models: dict[str, Path], tmp_path: Path, settings: list[str], answer: int
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path / "gpt2")
    rows = [
        {"sentence": " ".join(words * 20), "label": n % 2} for n, words in enumerate(itertools.permutations(OTHER[:4]))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [
        f"model.name_or_path={tmp_path / 'gpt2'}",
        *("data.data_dir=null", "data.task=null", "data.template={sentence}"),
        f"data.train_file={tmp_path / 'train.jsonl'}",
    ]
    config = configure("llama", *own, *settings, "data.max_length=200", "training.max_steps=1")
    limit = 48 - (config.method.num_virtual_tokens or 0) - answer
    assert train(config)["max_length"] == limit
    config = configure("llama", *own, *settings, f"method.num_virtual_tokens={48 - answer}")
    with pytest.raises(ValueError, match=f"{answer} tokens after the prompt, but answers may have {answer}: "):
        prepare(config)


def test_texts_that_the_tokenizer_cannot_read_are_counted(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shares = {"train": 0.75, "validation": 0.5, "test": 0.0}
    for split, share in shares.items():
        words = [*itertools.product(OTHER, OTHER)][list(shares).index(split) :: 5]
        texts = [" ".join([*words[n], "🚀" if n < 20 * share else "good"]) for n in range(20)]
        lines = [json.dumps({"sentence": text, "label": n % 2}) for n, text in enumerate(texts)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    run = prepare(configure("t5", f"data.data_dir={tmp_path}"))
    assert run.run_data.unread_texts == shares
    assert "does not know part of 75% of the train texts and reads it as <unk>" in caplog.text
    console = Console(width=120, record=True, file=io.StringIO())
    summary = run_summary(run) | {"left_out": {"no label": 1, "blank text": 2}}
    console.print(summary_table(summary, "training"))
    shown = console.export_text()
    assert "train 75.0%, validation 50.0%, test 0.0%" in shown
    assert "1 row with no label" in shown
    assert "2 rows with blank text" in shown
    run.tokenizer.unk_token = "</s>"  # as of tokenizers that know every byte
    assert load_run_data(run.config.data, run.tokenizer, "SEQ_2_SEQ_LM").unread_texts == {}


def test_whole_numbers_are_classes_where_one_says_so(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"film {i},{i % 30}\n" for i in range(90)))
    found = [resolved(DataConfig(train_file=str(file), kind=kind), "SEQ_CLS") for kind in (None, "classification")]
    assert [found[0].label_words, found[1].label_values] == [None, None]
    assert list((found[1].label_words or {}).values()) == [str(n) for n in range(30)]
    assert resolved(DataConfig(**found[1].model_dump()), "SEQ_CLS") == found[1]  # as the run has it
    with pytest.raises(ValidationError, match=r"data\.kind and data\.label_words exclude each other: give one"):
        DataConfig(train_file=str(file), kind="classification", label_words=["a", "b"])
