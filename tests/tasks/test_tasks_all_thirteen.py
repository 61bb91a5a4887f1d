"""Every task from the hub's own columns: by its hub id, from a folder, encoded for each kind of model, and run."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from tiny_models import FAMILIES, ONE_A_TASK, TASK_OF
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ept.runs.config import load_run_config
from ept.runs.train import train
from ept.tasks import TASKS, get_task, load_task
from ept.tasks.encoding import Collator, encode_split, fit_rows

WSC = {"text": "Mark told Pete a lie about himself.", "span1_index": 0, "span1_text": "Mark", "span2_index": 6}
PAIR = {"sentence1": "A.", "sentence2": "B."}
NLI = {"premise": "P.", "hypothesis": "H."}
SPANS_OF_WIC = {"start1": 2, "start2": 4, "end1": 6, "end2": 8}
MULTIRC = {"paragraph": "<b>Sent 1: </b>One.<br>Two.<br>", "question": "Who?", "answer": "I"}
# task: two rows as the hub has them (besides idx), the second in what differs; the first one's text and target
ROWS = {
    "glue/cola": ({"sentence": "One.", "label": 0}, {"label": 1}, "sentence: One.", "0"),
    "glue/mnli": ({**NLI, "label": 2}, {"label": 0}, "premise: P. hypothesis: H.", "2"),
    "glue/mrpc": ({**PAIR, "label": 1}, {"label": 0}, "sentence1: A. sentence2: B.", "1"),
    "glue/qnli": ({"question": "Q?", "sentence": "S.", "label": 0}, {"label": 1}, "question: Q? sentence: S.", "0"),
    "glue/qqp": ({"question1": "Q?", "question2": "R?", "label": 1}, {"label": 0}, "question1: Q? question2: R?", "1"),
    "glue/rte": ({**PAIR, "label": 0}, {"label": 1}, "sentence1: A. sentence2: B.", "0"),
    "glue/sst2": ({"sentence": "fine ", "label": 1}, {"label": 0}, "sentence: fine ", "1"),
    "glue/stsb": ({**PAIR, "label": 2.3329999446868896}, {"label": 5.0}, "sentence1: A. sentence2: B.", "2.4"),
    "super_glue/boolq": (
        {"question": "is it", "passage": "It is.", "label": 1}, {"label": 0}, "question: is it passage: It is.", "1",
    ),
    "super_glue/cb": ({**NLI, "label": 1}, {"label": 2}, "premise: P. hypothesis: H.", "1"),
    "super_glue/multirc": (
        {**MULTIRC, "label": 1}, {"answer": "You", "label": 0},
        "question: Who? answer: I paragraph: Sent 1: One. Two. ", "1",
    ),
    "super_glue/wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 1, **SPANS_OF_WIC}, {"label": 0},
        "sentence1: A bank. sentence2: The bank. word: bank", "1",
    ),
    "super_glue/wsc": (
        {**WSC, "span2_text": "himself.", "label": 0}, {"label": 1},
        "text: * Mark * told Pete a lie about # himself. #", "0",
    ),
}  # fmt: skip


def hub_rows(name, split):
    """Six rows of the hub's columns, different in each split."""
    first, second, *_ = ROWS[name]
    column = get_task(name).source_columns[-1 if name == "super_glue/multirc" else 0]
    if name == "super_glue/multirc":  # the questions and their answers are a split's own
        first = {**first, "question": f"{first['question']}{'' if split == 'train' else split}"}
    rows = [{**first, **(second if i % 2 else {}), "idx": i} for i in range(6)]
    for i, row in enumerate(rows):
        if split != "train" or i:
            row[column] = f"{row[column]} {split} {i}"
    return rows


def labelled_splits(name):
    return ("train", *(["validation_matched", "validation_mismatched"] if name == "glue/mnli" else ["validation"]))


@pytest.fixture(params=sorted(TASKS))
def name(request):
    return request.param


def check(data, name):
    *_, text, target = ROWS[name]
    assert (data.train[0]["text"], data.train[0]["target"]) == (text, target)
    assert len(data.train) == 6
    assert len(data.validation) + len(data.test) == (12 if name == "glue/mnli" else 6)
    assert not any(" test " in row for row in data.test["text"])  # the hub hides their labels


def test_from_the_hub(name, monkeypatch):
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        loaded = {split: hub_rows(name, split) for split in (*labelled_splits(name), "test")}
        for row in loaded["test"]:
            row["label"] = -1.0 if name == "glue/stsb" else -1
        if name == "glue/mnli":  # whose hidden splits have other names
            loaded["test_matched"] = loaded.pop("test")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in loaded.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load_task(get_task(name)), name)
    owner, _, config = name.partition("/")
    wanted = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}[owner]
    assert calls == [(wanted, "wsc.fixed" if config == "wsc" else config)]


def write_folder(folder, name):
    for split in labelled_splits(name):
        lines = [json.dumps(row) for row in hub_rows(name, split)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def characters():
    vocabulary = {"<pad>": 0, "</s>": 1} | {chr(code): code for code in range(2, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="</s>")


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("labels", ["digits", "words"])
def test_from_a_folder_and_encoded_for_every_kind_of_model(name, task_type, labels, tmp_path):
    task, tokenizer = get_task(name), characters()
    data = load_task(task, data_dir=write_folder(tmp_path, name), labels=labels)
    if labels == "digits":
        check(data, name)
    fitted = fit_rows(task, list(data.train), tokenizer, task_type, 400, truncate=False, source="train")
    train = data.train.add_column("text_ids", [row.ids for row in fitted])
    encoded = encode_split(train, tokenizer, data.labels, task_type)
    batch = Collator(task_type, 0)([encoded[i] for i in range(len(encoded))])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    if task_type == "SEQ_CLS":
        wanted = list(data.train["number" if task.values else "label"])
        assert batch["labels"].tolist() == pytest.approx(wanted)
        assert batch["labels"].is_floating_point() == bool(task.values)
    else:
        answer = [token for token in batch["labels"][0].tolist() if token != -100]
        decoded = tokenizer.convert_ids_to_tokens(answer)
        assert "".join(decoded).replace("</s>", "").strip() == data.train[0]["target"]


SPECIAL: dict[str, Any] = {"vocab_size": 127, "pad_token_id": 0, "eos_token_id": 1}  # of the tokenizer of characters
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": None},
    "t5": {"decoder_start_token_id": 0},
    "bert": {"max_position_embeddings": 512},
}
# Each task with one kind of model in turn; those whose labels or rows are of another kind with all three.
SPECIAL_TASKS = ("glue/stsb", "super_glue/multirc")
CASES = [(name, ONE_A_TASK[i % 3]) for i, name in enumerate(sorted(TASKS)) if name not in SPECIAL_TASKS]
CASES += [(name, family) for name in SPECIAL_TASKS for family in ONE_A_TASK]


@pytest.fixture(scope="module")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    for family in ONE_A_TASK:
        _, model_class, config_class, arguments = FAMILIES[family]
        model_class = "BertModel" if family == "bert" else model_class  # each task draws a head of its own
        config = getattr(transformers, config_class)(**{**arguments, **SPECIAL, **CHANGES[family]})
        getattr(transformers, model_class)(config).save_pretrained(folder / family)
        characters().save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("name, family", CASES)
@pytest.mark.usefixtures("no_curves")
def test_a_whole_run(name: str, family: str, base_models: Path, tmp_path: Path) -> None:
    task = get_task(name)
    (tmp_path / "data").mkdir()
    settings = [
        *(f"model.name_or_path={base_models / family}", f"output_dir={tmp_path / 'run'}", f"data.task={name}"),
        *(f"data.data_dir={write_folder(tmp_path / 'data', name)}", "method.num_virtual_tokens=3", "method.r=2"),
        *("training.max_steps=2", "training.eval_steps=2", "training.score_before=false"),
    ]
    results = train(load_run_config(None, settings))
    assert (results["task"], results["metric"], results["max_length"]) == (name, task.metrics[0], task.max_length)
    assert set(results["test_metrics"]) == {*task.metrics, "unparsable"}
    assert results["score"] == results["test_metrics"][task.metrics[0]]
    assert all(-1 <= value <= 1 for value in results["test_metrics"].values())
    if TASK_OF[family] != "SEQ_2_SEQ_LM":  # a random encoder-decoder generates what it likes
        assert results["test_metrics"]["unparsable"] == 0
    head = 0 if TASK_OF[family] != "SEQ_CLS" else 32 * task.num_outputs + task.num_outputs
    assert results["trainable_parameters"] - head == 3 * 32 + 2 * (32 + 1 + 32) + 32 + 1 + 4 * (2 * 2 * 32 + 32)
