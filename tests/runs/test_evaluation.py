"""Predictions equal their definition, computed one text and one label at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import FAMILIES, OTHER

from ept.runs.adapters import load_trained
from ept.runs.config import load_run_config
from ept.runs.loading import load_tokenizer
from ept.runs.predict import evaluate, predict_labels

TEXTS = ["review : the film was good", "bad", " ".join(OTHER), "review : dreadful", "so long and very lovely"]
LABELS: dict[str, Sequence[str]] = {
    "one token each": ("0", "1"),
    "shared beginning": ("very good", "very bad", "very poor"),
    "unequal lengths": ("good", "very very bad", "so poor"),
    "one begins another": ("good", "good film"),
}


def load(run: Path, family: str) -> tuple[Any, Any]:
    config = load_run_config(run / "config.yaml")
    tokenizer = load_tokenizer(config.model)
    return load_trained(config, run / "adapter", FAMILIES[family], 2, 0), tokenizer


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
    model, tokenizer = load(runs["llama"], "llama")
    end = labels == LABELS["one begins another"]
    with torch.no_grad():
        scores = torch.tensor([[log_likelihood(model, tokenizer, t, label, end) for label in labels] for t in TEXTS])
    assert (scores.topk(2).values.diff().abs() > 1e-3).all(), "a tie would make this test say nothing"
    found = predict_labels(model, tokenizer, TEXTS, labels, "CAUSAL_LM", 16, batch_size)
    assert found == scores.argmax(-1).tolist()


def test_seq2seq_ranking(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["t5"], "t5")
    labels = ("0", "very good", "1")
    scores = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        for label in labels:
            target = tokenizer(text_target=label, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                mean = model(**inputs, labels=target).loss
            scores.append(-float(mean) * target.shape[1])
    expected = torch.tensor(scores).view(len(TEXTS), len(labels)).argmax(-1).tolist()
    assert predict_labels(model, tokenizer, TEXTS, labels, "SEQ_2_SEQ_LM", 16, 2, scoring="rank") == expected


def test_seq2seq_generation_counts_what_is_no_label(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["t5"], "t5")
    texts = ["sentence : the film was good", "sentence : the plot was awful"]
    assert predict_labels(model, tokenizer, texts, ("0", "1"), "SEQ_2_SEQ_LM", 16, 2) == [1, 0]
    assert predict_labels(model, tokenizer, texts, ("no", "yes"), "SEQ_2_SEQ_LM", 16, 2) == [-1, -1]
    rows = {"text": texts, "label": [1, 0]}
    metrics = evaluate(model, tokenizer, rows, ("no", "1"), ["accuracy"], "SEQ_2_SEQ_LM", 16, 2)
    assert metrics == {"accuracy": 0.5, "unparsable": 0.5}


def test_causal_generation_reads_the_label_at_the_start(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["llama"], "llama")
    texts = ["sentence : the film was good", "sentence : the plot was awful"]
    assert predict_labels(model, tokenizer, texts, ("0", "1"), "CAUSAL_LM", 16, 2, scoring="generate") == [1, 0]
    assert predict_labels(model, tokenizer, texts, ("no", "yes"), "CAUSAL_LM", 16, 2, scoring="generate") == [-1, -1]


def test_classifier_takes_the_largest_logit(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["bert"], "bert")
    with torch.no_grad():
        expected = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in TEXTS]
    assert predict_labels(model, tokenizer, TEXTS, ("0", "1"), "SEQ_CLS", 16, 3) == expected


def test_refusals(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["bert"], "bert")
    with pytest.raises(ValueError, match="scoring='rank' is not available for SEQ_CLS"):
        predict_labels(model, tokenizer, TEXTS, ("0", "1"), "SEQ_CLS", 16, 3, scoring="rank")
    with pytest.raises(ValueError, match=r"row 2: the text has 11 tokens, the limit is data\.max_length=8"):
        predict_labels(model, tokenizer, TEXTS, ("0", "1"), "SEQ_CLS", 8, 3)


def test_the_model_keeps_its_mode(runs: dict[str, Path]) -> None:
    model, tokenizer = load(runs["llama"], "llama")
    for training in (True, False):
        model.train(training)
        predict_labels(model, tokenizer, TEXTS[:1], ("0", "1"), "CAUSAL_LM", 16, 1)
        assert model.training is training
