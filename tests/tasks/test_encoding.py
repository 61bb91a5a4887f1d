"""The layouts of a batch, and label strings as tokens."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tiny_runs import VOCABULARY, save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ept.tasks.encoding import Collator, encode_labels, encode_split, encode_texts


@pytest.fixture(params=[False, True], ids=["plain", "end-token"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    save_tokenizer(tmp_path, end_token=request.param)
    return AutoTokenizer.from_pretrained(tmp_path)


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


ROWS = datasets.Dataset.from_dict({"text": ["the film was good", "bad"], "label": [1, 0]})
LABELS = ["0", "very very good"]  # of unequal length


def batch(tokenizer: PreTrainedTokenizerBase, task_type: str) -> dict[str, object]:
    split = encode_split(ROWS, tokenizer, LABELS, task_type, max_length=8)
    return Collator(task_type, 0)([split[0], split[1]])


def test_causal_batch_is_padded_on_the_left_and_labels_only_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    made = batch(tokenizer, "CAUSAL_LM")
    first = ids("the film was good very very good")
    second = ids("bad 0")
    assert made["input_ids"].tolist() == [first, [0] * 5 + second]  # type: ignore[attr-defined]
    assert made["attention_mask"].tolist() == [[1] * 7, [0] * 5 + [1] * 2]  # type: ignore[attr-defined]
    assert made["labels"].tolist() == [[-100] * 4 + first[4:], [-100] * 6 + second[1:]]  # type: ignore[attr-defined]
    assert made["logits_to_keep"] == 4
    assert type(made["logits_to_keep"]) is int


def test_seq2seq_batch_is_padded_on_the_right(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, end_token=True)
    made = batch(AutoTokenizer.from_pretrained(tmp_path), "SEQ_2_SEQ_LM")
    assert made["input_ids"].tolist() == [ids("the film was good </s>"), [*ids("bad </s>"), 0, 0, 0]]  # type: ignore[attr-defined]
    assert made["labels"].tolist() == [ids("very very good </s>"), [*ids("0 </s>"), -100, -100]]  # type: ignore[attr-defined]
    assert set(made) == {"input_ids", "attention_mask", "labels"}


def test_classifier_batch_has_class_indices(tokenizer: PreTrainedTokenizerBase) -> None:
    made = batch(tokenizer, "SEQ_CLS")
    assert torch.equal(made["labels"], torch.tensor([1, 0]))  # type: ignore[arg-type]
    assert made["attention_mask"].sum(1).tolist() == [len(i) for i in encode_texts(tokenizer, ROWS["text"], "SEQ_CLS")]  # type: ignore[attr-defined]


def test_too_long_text_is_refused_with_row_tokens_and_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"row 0: the text has 4 tokens, the limit is data\.max_length=3"):
        encode_split(ROWS, tokenizer, LABELS, "CAUSAL_LM", max_length=3)


def test_an_end_token_only_where_one_label_begins_another(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_labels(tokenizer, ["good", "bad"], "CAUSAL_LM") == [ids("good"), ids("bad")]
    assert encode_labels(tokenizer, ["very", "very good"], "CAUSAL_LM") == [ids("very </s>"), ids("very good </s>")]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="one label begins another and the tokenizer has no end token"):
        encode_labels(tokenizer, ["very", "very good"], "CAUSAL_LM")


def test_labels_that_the_tokenizer_cannot_tell_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="cannot tell the label 'marvellous' from another one"):
        encode_labels(tokenizer, ["marvellous", "horrible"], "CAUSAL_LM")  # both unknown words
