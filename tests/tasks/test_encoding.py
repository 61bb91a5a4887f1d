"""The layouts of a batch, and label strings as tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from datasets import Dataset
from tiny_runs import VOCABULARY, save_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ept.tasks import local_task, render
from ept.tasks.encoding import Collator, encode_answers, encode_labels, encode_split, encode_texts, fit_rows


@pytest.fixture(params=[False, True], ids=["plain", "end-token"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    save_tokenizer(tmp_path, end_token=request.param)
    return AutoTokenizer.from_pretrained(tmp_path)


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


TASK = local_task("{text}", ["no", "yes"])
ROWS = [{"text": "the film was good", "label": 1}, {"text": "bad", "label": 0}]
LABELS = ["0", "very very good"]  # of unequal length


def batch(tokenizer: PreTrainedTokenizerBase, task_type: str) -> dict[str, Any]:
    fitted = fit_rows(TASK, ROWS, tokenizer, task_type, 8, truncate=False, source="train")
    split = {"text_ids": [row.ids for row in fitted], "label": [row["label"] for row in ROWS]}
    encoded = encode_split(Dataset.from_dict(split), tokenizer, LABELS, task_type)
    return Collator(task_type, 0)([encoded[0], encoded[1]])


def test_causal_batch_is_padded_on_the_left_and_labels_only_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    made = batch(tokenizer, "CAUSAL_LM")
    first = ids("the film was good very very good")
    second = ids("bad 0")
    assert made["input_ids"].tolist() == [first, [0] * 5 + second]
    assert made["attention_mask"].tolist() == [[1] * 7, [0] * 5 + [1] * 2]
    assert made["labels"].tolist() == [[-100] * 4 + first[4:], [-100] * 6 + second[1:]]
    assert made["logits_to_keep"] == 4
    assert type(made["logits_to_keep"]) is int
    assert torch.equal(made["text_mask"], (made["labels"] == -100) & made["attention_mask"].bool())


def test_seq2seq_batch_is_padded_on_the_right(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, end_token=True)
    made = batch(AutoTokenizer.from_pretrained(tmp_path), "SEQ_2_SEQ_LM")
    assert made["input_ids"].tolist() == [ids("the film was good </s>"), [*ids("bad </s>"), 0, 0, 0]]
    assert made["labels"].tolist() == [ids("very very good </s>"), [*ids("0 </s>"), -100, -100]]
    assert set(made) == {"input_ids", "attention_mask", "labels"}


def test_classifier_batch_has_class_indices(tokenizer: PreTrainedTokenizerBase) -> None:
    made = batch(tokenizer, "SEQ_CLS")
    assert torch.equal(made["labels"], torch.tensor([1, 0]))
    encoded = encode_texts(tokenizer, [row["text"] for row in ROWS], "SEQ_CLS")
    assert made["attention_mask"].sum(1).tolist() == list(map(len, encoded))


def test_too_long_text_is_refused_with_row_tokens_and_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"train, row 1: the text has 4 tokens, but the limit is data\.max_length=3"):
        fit_rows(TASK, ROWS, tokenizer, "CAUSAL_LM", 3, truncate=False, source="train")


def test_rows_that_fit_are_tokenised_once(tokenizer: PreTrainedTokenizerBase) -> None:
    watched = Mock(wraps=tokenizer)
    limit = len(encode_texts(tokenizer, ["the film was good"], "SEQ_CLS")[0])
    fitted = fit_rows(TASK, ROWS, watched, "SEQ_CLS", limit, truncate=True, source="train")
    assert watched.call_args_list == [call(["the film was good", "bad"])]
    assert fitted == [(row["text"], tokenizer(row["text"])["input_ids"], False) for row in ROWS]


def test_too_long_text_is_cut_with_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    marks = len(tokenizer("bad")["input_ids"]) - 1
    loaded = {"text": "the film was good", "label": 1, "fields": {"text": "the film was good"}}
    for row in (ROWS[0], loaded):
        (cut,) = fit_rows(TASK, [row], tokenizer, "SEQ_CLS", 3 + marks, truncate=True, source="train")
        assert cut == ("the film was", tokenizer("the film was")["input_ids"], True)
    assert render(TASK, loaded) == "the film was good"
    assert fit_rows(TASK, [], tokenizer, "SEQ_CLS", 3, truncate=True, source="train") == []


def test_an_end_token_only_where_one_label_begins_another(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_labels(tokenizer, ["good", "bad"], "CAUSAL_LM") == [ids("good"), ids("bad")]
    assert encode_labels(tokenizer, ["very", "very good"], "CAUSAL_LM") == [ids("very </s>"), ids("very good </s>")]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="one label begins another and the tokenizer has no end token"):
        encode_labels(tokenizer, ["very", "very good"], "CAUSAL_LM")


def test_what_an_encoder_decoder_is_to_write_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    for own in ("$A", "$A </s>", "$A </s> <en>"):  # as a tokenizer adds none, as T5's, as mBART's
        target = copy.deepcopy(tokenizer)
        target.add_tokens("<en>")
        end, language = target.convert_tokens_to_ids(["</s>", "<en>"])
        special = [("</s>", end), ("<en>", language)]
        target.backend_tokenizer.post_processor = TemplateProcessing(single=own, special_tokens=special)
        tail = [end, language] if "<en>" in own else [end]
        assert encode_labels(target, ["good"], "SEQ_2_SEQ_LM") == [[*ids("good"), *tail]]
        assert encode_answers(target, ["very good"], "SEQ_2_SEQ_LM", None) == [[*ids("very good"), *tail]]


def test_an_answer_stands_behind_one_space(tokenizer: PreTrainedTokenizerBase) -> None:
    watched = Mock(wraps=tokenizer, eos_token_id=None)
    assert encode_answers(watched, [" good"], "CAUSAL_LM", None) == [ids("good")]
    assert watched.call_args.args == ("a good",)


def test_labels_that_the_tokenizer_cannot_tell_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="cannot tell the label 'marvellous' from another one"):
        encode_labels(tokenizer, ["marvellous", "horrible"], "CAUSAL_LM")  # both unknown words
