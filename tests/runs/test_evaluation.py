"""Predictions equal their definition, computed one text and one label at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tiny_runs import FAMILIES, OTHER, VOCABULARY

from ept.runs import predict
from ept.runs.adapters import load_trained
from ept.runs.config import ModelConfig, RunConfig, load_run_config
from ept.runs.data import with_texts
from ept.runs.exporting import base_of
from ept.runs.loading import load_tokenizer
from ept.runs.predict import Predictor
from ept.runs.processes import Processes
from ept.tasks import get_task, local_task

TEXTS = ["review : the film was good", "bad", " ".join(OTHER), "review : dreadful", "so long and very lovely"]
LABELS: dict[str, Sequence[str]] = {
    "one token each": ("0", "1"),
    "shared beginning": ("very good", "very bad", "very poor"),
    "equal lengths": ("very good", "so poor"),
    "unequal lengths": ("good", "very very bad", "so poor"),
    "one begins another": ("good", "good film"),
}


def predictor(run: Path, family: str, labels: Sequence[str] = ("0", "1"), *overrides: str) -> Predictor:
    config = load_run_config(run / "config.yaml", ["data.labels=words", "data.max_length=16", *overrides])
    tokenizer = load_tokenizer(config.model)
    model = load_trained(config, run / "adapter", FAMILIES[family], 2, 0)
    task = local_task("{text}", dict(enumerate(labels)))
    return Predictor(config=config, task=task, task_type=FAMILIES[family], tokenizer=tokenizer, model=model)


def rows(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def predictions(found: Predictor, texts: Sequence[str] = TEXTS) -> list[int]:
    return found.predict([row.ids for row in found.fit(rows(texts), "texts")])


def assert_ranked_by(found: Predictor, log_likelihoods: torch.Tensor) -> None:
    """Compares the probabilities, which tell a wrong likelihood where the largest may be the right one by chance."""
    answers = found.answer([row.ids for row in found.fit(rows(TEXTS), "texts")])
    probabilities = torch.tensor([answer.probabilities for answer in answers])
    torch.testing.assert_close(probabilities.log(), log_likelihoods.log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert [answer.label for answer in answers] == probabilities.argmax(-1).tolist()


def log_likelihood(model: Any, tokenizer: Any, text: str, label: str, end: bool) -> float:
    """Σ log p(token of the label), one plain forward a token, none of the batching."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(label, add_special_tokens=False)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    total = 0.0
    for position, token in enumerate(answer):
        tokens = torch.tensor([ids + answer[:position]])
        is_text = torch.tensor([[True] * len(ids) + [False] * position])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), text_mask=is_text).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("labels", LABELS.values(), ids=list(LABELS))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_causal_ranking(runs: dict[str, Path], labels: Sequence[str], batch_size: int) -> None:
    found = predictor(runs["llama"], "llama", labels, f"training.eval_batch_size={batch_size}")
    end = labels == LABELS["one begins another"]
    with torch.no_grad():
        each = [[log_likelihood(found.model, found.tokenizer, text, label, end) for label in labels] for text in TEXTS]
    assert_ranked_by(found, torch.tensor(each))


def test_seq2seq_ranking(runs: dict[str, Path]) -> None:
    labels = ("0", "very good", "1")
    found = predictor(runs["t5"], "t5", labels, "training.scoring=rank", "training.eval_batch_size=2")
    scores = []
    for text in TEXTS:
        inputs = found.tokenizer(text, return_tensors="pt")
        for label in labels:
            target = found.tokenizer(text_target=label, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                mean = found.model(**inputs, labels=target).loss
            scores.append(-float(mean) * target.shape[1])
    runs_of_encoder: list[int] = []
    encoder = found.model.get_base_model().get_encoder()
    encoder.register_forward_hook(lambda module, args, output: runs_of_encoder.append(len(output[0])))
    assert_ranked_by(found, torch.tensor(scores).view(len(TEXTS), len(labels)))
    assert runs_of_encoder == [2, 2, 1], "once a batch, for all labels"


def test_seq2seq_generation_counts_what_is_no_label(runs: dict[str, Path]) -> None:
    texts = ["sentence : the film was good", "sentence : the plot was awful"]
    assert predictions(predictor(runs["t5"], "t5"), texts) == [1, 0]
    assert predictions(predictor(runs["t5"], "t5", ("no", "yes")), texts) == [-1, -1]
    found = predictor(runs["t5"], "t5", ("no", "1"))
    split = datasets.Dataset.from_dict({"text": texts, "label": [1, 0]})
    split, rate = with_texts(split, found.fit(rows(texts), "texts"))
    assert found.score(split) == {"accuracy": 0.5, "unparsable": 0.5}
    assert rate == 0


@pytest.mark.parametrize("labels", [("no?", "yes?"), ("<good>", "{bad}"), ("0 -", "( 1 )")], ids=str)
def test_seq2seq_answers_are_compared_as_tokens(runs: dict[str, Path], labels: Sequence[str]) -> None:
    """Labels that the tokenizer writes differently, or in part not at all: `no ?`, an unknown token left out."""
    found = predictor(runs["t5"], "t5", labels)
    assert not {found._text(answer) for answer in found.answers} & set(labels)
    longest = max(map(len, found.answers))
    other = [*found.answers[0][:-1], *found.answers[0]]  # the label, and more behind it
    answers = [found.answers[1], found.answers[0], other]
    generated = torch.tensor([[0, *answer, *[0] * (2 * longest - len(answer))] for answer in answers])
    found.model.generate = lambda **options: generated
    assert [answer.label for answer in found.predict_batch([[5], [6], [7]])] == [1, 0, -1]


def test_causal_generation_reads_the_label_at_the_start(runs: dict[str, Path]) -> None:
    texts = ["sentence : the film was good", "sentence : the plot was awful"]
    for labels, expected in ((("0", "1"), [1, 0]), (("no", "yes"), [-1, -1])):
        assert predictions(predictor(runs["llama"], "llama", labels, "training.scoring=generate"), texts) == expected
    found = predictor(runs["llama"], "llama", ("very good", "bad"), "training.scoring=generate")
    written = [["very", "good", "bad"], ["bad", "very", "good"], ["very", "bad", "good"]]
    found.model.generate = lambda **options: torch.tensor([[5, *map(VOCABULARY.get, words)] for words in written])
    assert [answer.label for answer in found.predict_batch([[5]] * 3)] == [0, 1, -1]


def test_causal_generation_takes_a_number_for_the_nearest_label(runs: dict[str, Path]) -> None:
    """The row's end may have cut a number without a point, and a comma may be a point or not."""
    written = {
        "3.75 and so": "3.8", "3.0": "3.0", "3 of 5": "3.0", "+4.15": "4.2", "4.1\n4.9": "4.0", "3.": "3.0",
        "0. ": "0.0", "3 END": "3.0", "3": None, "3,5": None, "3.5,5": None, "3,500 of them": None, "7.0": None,
        "-1.0": None, "about 3.0": None, "nan": None, "": None,
    }  # fmt: skip
    found = predictor(runs["llama"], "llama", ("0", "1"), "training.scoring=generate")
    end = found.tokenizer.eos_token_id
    found.task, found.answers = get_task("glue/stsb"), [[99]]
    places = dict(enumerate(written, start=100))
    found._text = lambda row: places[row[0]].removesuffix("END").strip()
    found._generate = lambda inputs, most: torch.tensor(
        [[5, place, end if "END" in places[place] else 98] for place in places]
    )
    answers = [answer.label for answer in found.predict_batch([[5]] * len(places))]
    labels = [None if label == -1 else found.task.label_words[label] for label in answers]
    assert dict(zip(written, labels)) == written
    found.task = local_task("{text}", ["3", "4"])  # of classes, a number is none
    assert {answer.label for answer in found.predict_batch([[5]] * len(places))} == {-1}


HABITS = {
    "min_length": 9,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 30.0,
    "suppress_tokens": [3, 4],
    "num_beams": 4,
}


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_checkpoints_own_ways_of_writing_do_not_count(runs: dict[str, Path], family: str) -> None:
    labels, texts = predictor(runs[family], family, ("0", "1"), "training.scoring=generate"), TEXTS * 3
    writer = predictor(runs[family], family, ("0", "1"), "data.max_answer=6")
    ids = [row.ids for row in writer.fit(rows(texts), "texts")]
    expected, written = predictions(labels, texts), writer.write(ids)
    assert len(set(expected)) > 1
    for found in (labels, writer):
        found.model.get_base_model().generation_config.update(**HABITS)
    assert (predictions(labels, texts), writer.write(ids)) == (expected, written)
    assert labels.model.get_base_model().generation_config.min_length == 9  # as an export writes it


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("end", [2, None])
def test_answers_in_free_text_end_where_training_ended_them(
    runs: dict[str, Path], family: str, end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = predictor(runs[family], family, ("0", "1"), "data.max_answer=4")
    base, first = found.model.get_base_model(), {"t5": 1, "llama": 2}[family]
    stop = found.tokenizer.eos_token_id
    base.generation_config.eos_token_id = end
    ends = []

    def generate(**inputs: Any) -> torch.Tensor:
        ends.append(base.generation_config.eos_token_id)
        return torch.tensor([[0] * first + [4, stop, 5, 5], [0] * first + [4, 5, 5, 5]])

    monkeypatch.setattr(found.model, "generate", generate)
    assert found.write([[4] * first, [5] * first]) == ["1", "1 no no no"]
    assert ends == [sorted({stop, end} - {None})]


def test_classifier_takes_the_largest_logit(runs: dict[str, Path]) -> None:
    found = predictor(runs["bert"], "bert", ("0", "1"), "training.eval_batch_size=3")
    with torch.no_grad():
        expected = [int(found.model(**found.tokenizer(t, return_tensors="pt")).logits.argmax()) for t in TEXTS]
    assert predictions(found) == expected


def test_refusals(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="scoring='rank' is not available for SEQ_CLS"):
        predictor(runs["bert"], "bert", ("0", "1"), "training.scoring=rank")
    found = predictor(runs["bert"], "bert", ("0", "1"), "data.max_length=8", "data.on_too_long=error")
    with pytest.raises(ValueError, match=r"texts, row 3: the text has 11 tokens, but the limit is data\.max_length=8"):
        predictions(found)


def test_the_model_keeps_its_mode(runs: dict[str, Path]) -> None:
    found = predictor(runs["llama"], "llama")
    for training in (True, False):
        found.model.train(training)
        predictions(found, TEXTS[:1])
        assert found.model.training is training


def test_the_loss_of_texts_is_that_of_a_token_and_taken_without_dropout(monkeypatch):
    class Model(torch.nn.Module):
        device, modes = torch.device("cpu"), []

        def forward(self, **batch: torch.Tensor) -> SimpleNamespace:
            self.modes.append((self.training, torch.is_grad_enabled()))
            return SimpleNamespace(loss=batch["labels"].float().mean())

    encoded = datasets.Dataset.from_dict({"input_ids": [[5, 6], [5]], "labels": [[8], [4, 4, 4]], "length": [2, 1]})
    monkeypatch.setattr(predict, "encode_split", lambda *_, **__: encoded)
    found, model = object.__new__(Predictor), Model().train()
    config = RunConfig()
    config.training.eval_batch_size = 1
    parts = {"config": config, "task": SimpleNamespace(is_chat=False), "task_type": "SEQ_2_SEQ_LM"}
    vars(found).update(parts, tokenizer=SimpleNamespace(pad_token_id=0), model=model, processes=Processes())
    assert found.loss(None) == (1 * 8 + 3 * 4) / 4
    assert (model.modes, model.training) == ([(False, False)] * 2, True)


def test_another_base_model_for_an_export_leaves_the_configuration_as_it_is():
    config = RunConfig(model=ModelConfig(name_or_path="one"))
    its_own = SimpleNamespace(base_model_name_or_path="other", task_type="CAUSAL_LM")
    described, _ = base_of(SimpleNamespace(layer=SimpleNamespace(config=its_own)), config, "other")
    assert (described.name_or_path, config.model.name_or_path) == ("other", "one")
