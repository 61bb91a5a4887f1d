"""From a row in a file to a padded batch, one layout for each task type; training and evaluation share it.

SEQ_2_SEQ_LM: text padded on the right, labels = tokens of the target. CAUSAL_LM: [text; target] padded left, labels on
the target only. SEQ_CLS: text padded on the right, one class index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .rows import FIELDS, NUMBER, ROW, fit_to_length, render
from .task import Task

if TYPE_CHECKING:
    import datasets

IGNORE = -100  # the label of a position that has no part in the loss
TEXT_IDS = "text_ids"
"""The column of a dataset within the length limit that holds the tokens of each row's `text`."""
WEIGHT, WEIGHTS = "weight", "weights"
"""The column with the weight of a row's loss, where rows have one, and the entry of a batch with those of its rows."""


class FittedText(NamedTuple):
    """A row's text within the length limit, its tokens, and whether it was cut for that."""

    text: str
    ids: list[int]
    is_cut: bool


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], task_type: str) -> list[list[int]]:
    """Tokenises input texts with the tokenizer's own start and end tokens; a decoder's text stays open."""
    encoded = [list(ids) for ids in tokenizer(list(texts))["input_ids"]] if len(texts) else []
    if task_type == "CAUSAL_LM":
        for ids in encoded:
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
    return encoded


def encode_labels(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], task_type: str) -> list[list[int]]:
    """Tokenises each label string as an answer: after a space for decoders, with an end token for encoder-decoders.

    Raises:
        ValueError: two labels have the same tokens, one has none, or an end token is needed and there is none.
    """
    if task_type == "SEQ_2_SEQ_LM":
        encoded = _encode_targets(tokenizer, labels)
    else:
        # As " label" follows a text, whatever mark the tokenizer puts at the start of a string.
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        encoded = [tokenizer(f"a {label}", add_special_tokens=False)["input_ids"] for label in labels]
        for index, ids in enumerate(encoded):
            if ids[: len(before)] == before and len(ids) > len(before):
                encoded[index] = ids[len(before) :]
            else:
                encoded[index] = tokenizer(f" {labels[index]}", add_special_tokens=False)["input_ids"]
    for label, ids in zip(labels, encoded):
        if not ids:
            raise ValueError(f"the label {label!r} has no tokens")
        if encoded.count(ids) > 1:
            raise ValueError(f"the tokenizer cannot tell the label {label!r} from another one: use other label words")
    # A decoder's answers have no end token: it would take half of the loss of a one-token answer and says nothing about
    # the label. Only where one label begins another ("not", "not at all") does it decide between them: all get one.
    if any(a is not b and b[: len(a)] == a for a in encoded for b in encoded):
        if tokenizer.eos_token_id is None:
            raise ValueError("one label begins another and the tokenizer has no end token: use other label words")
        encoded = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return encoded


def _encode_targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises what an encoder-decoder is to write, with an end token, which not every tokenizer adds."""
    encoded = tokenizer(text_target=list(texts))["input_ids"] if len(texts) else []
    end = tokenizer.eos_token_id
    return [[*ids] if end is None or end in ids else [*ids, end] for ids in encoded]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    task_type: str,
    max_tokens: int | None,
    spaced: bool = True,
) -> list[list[int]]:
    """Tokenises answers in free text, each with an end token unless it is cut to `max_tokens` (None: none is).

    `spaced`: a decoder's answer stands behind a space, as after most texts; in a chat it does not.
    """
    if task_type == "SEQ_2_SEQ_LM":
        encoded = _encode_targets(tokenizer, texts)
    else:
        start = "a " if spaced else ""  # as " answer" follows a text
        before = tokenizer("a", add_special_tokens=False)["input_ids"] if spaced else []
        texts = [text.removeprefix(" ") for text in texts] if spaced else texts
        encoded = [tokenizer(f"{start}{text}", add_special_tokens=False)["input_ids"][len(before) :] for text in texts]
        if tokenizer.eos_token_id is not None:
            encoded = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return [ids[:max_tokens] for ids in encoded]


def fit_rows(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    max_length: int,
    *,
    truncate: bool,
    source: str,
    numbers: Sequence[int] | None = None,
) -> list[FittedText]:
    """Renders and tokenises each row, once unless it is too long: `max_length` counts start and end tokens.

    `rows` are as they lie in a data file, or those of a `TaskData` split.

    Args:
        numbers: of the rows in their file, where some of its rows are not there.

    Raises:
        ValueError: a row has no text, or is too long and not to be truncated; names `source`, the row (counted from 1),
            its tokens and the limit.
    """
    texts = []
    numbers = numbers or [_number(row, position) for position, row in enumerate(rows, start=1)]
    for number, row in zip(numbers, rows):
        try:
            texts.append(render(task, row))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    fitted = [FittedText(text, ids, False) for text, ids in zip(texts, encode_texts(tokenizer, texts, task_type))]
    too_long = [index for index, (_, ids, _) in enumerate(fitted) if len(ids) > max_length]
    if too_long and (not truncate or task.is_chat):  # a chat that is cut has lost its question
        number = numbers[too_long[0]]
        raise ValueError(
            f"{source}, row {number}: the text has {len(fitted[too_long[0]].ids)} tokens, the limit is "
            f"data.max_length={max_length}: shorten it, raise data.max_length"
            + (", or set data.on_too_long=truncate" if not task.is_chat else "")
        )
    if too_long:
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        room = max_length - (len(encode_texts(tokenizer, ["a"], task_type)[0]) - len(bare))
        cut = [fit_to_length(task, rows[index], tokenizer, room)[0] for index in too_long]
        for index, text, ids in zip(too_long, cut, encode_texts(tokenizer, cut, task_type)):
            fitted[index] = FittedText(text, ids, True)
    return fitted


def _number(row: Mapping[str, Any], position: int) -> int:
    """Returns a row's number in its file: rows of a `TaskData` split carry it, others are in the file's order."""
    return row[ROW] if isinstance(row.get(FIELDS), Mapping) and ROW in row else position


def encode_split(
    split: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    task_type: str,
    max_answer: int = 128,
    spaced: bool = True,
    outputs: Sequence[int] = (),
) -> datasets.Dataset:
    """Makes columns `input_ids`, `labels` (a class index for SEQ_CLS) and `length` from `text_ids` and `label`.

    For SEQ_CLS and a regression `labels` is the number itself, and where `outputs` are given that of each label's
    output. Without `labels` each row's `target` is its answer, of
    at most `max_answer` tokens and `spaced` as in `encode_answers`.
    """
    from datasets import Dataset

    inputs = list(split[TEXT_IDS])
    if labels and task_type == "SEQ_CLS":
        found = split[NUMBER if NUMBER in split.column_names else "label"][:]
        found = [outputs[label] for label in found] if outputs else found
    elif labels:
        answers = encode_labels(tokenizer, labels, task_type)
        found = [answers[label] for label in split["label"]]
    else:
        found = encode_answers(tokenizer, split["target"][:], task_type, max_answer, spaced)
    if task_type == "CAUSAL_LM":
        inputs = [ids + answer for ids, answer in zip(inputs, found)]
    return Dataset.from_dict({"input_ids": inputs, "labels": found, "length": list(map(len, inputs))})


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool = False, length: int = 0) -> torch.Tensor:
    """Makes one int64 tensor [B, n] of sequences; n is the length of the longest, and at least `length`."""
    length = max(length, *map(len, sequences))
    fill = [[value] * (length - len(sequence)) for sequence in sequences]
    return torch.tensor([[*f, *s] if left else [*s, *f] for f, s in zip(fill, sequences)], dtype=torch.long)


@dataclass
class Collator:
    """The step from rows of `encode_split` to a batch: `input_ids`, `labels` and, where a row is padded,
    `attention_mask` [B, n]: models wait for an accelerator to find out that a mask is all ones. Rows with a `weight`
    give `weights` [B].

    For CAUSAL_LM `logits_to_keep` (an int) comes with it: the labels of the batch and the position before them, so that
    the output head runs only there, or 0 (all positions); and `text_mask` [B, n], so that an accelerator need not be
    asked how many answers a row has.

    Args:
        pad_to_multiple_of: n is rounded up to a multiple of it, so that a compiled step meets few lengths.
        answer_tokens: the length of the longest answer there is, to which labels are padded (and logits kept) for the
            same reason; 0: that of each batch.
        label_only_logits: False keeps a decoder's logits at every position.
    """

    task_type: str
    pad_token_id: int
    pad_to_multiple_of: int | None = None
    answer_tokens: int = 0
    label_only_logits: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        left, multiple = self.task_type == "CAUSAL_LM", self.pad_to_multiple_of or 1
        inputs, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        length = -(-max(map(len, inputs)) // multiple) * multiple
        batch: dict[str, Any] = {"input_ids": pad(inputs, self.pad_token_id, left, length)}
        if min(map(len, inputs)) < length:
            batch["attention_mask"] = pad([[1] * len(ids) for ids in inputs], 0, left, length)
        if WEIGHT in rows[0]:
            batch[WEIGHTS] = torch.tensor([row[WEIGHT] for row in rows])
        if self.task_type == "SEQ_CLS":
            batch["labels"] = torch.tensor(labels, dtype=torch.float if isinstance(labels[0], float) else torch.long)
        elif self.task_type == "SEQ_2_SEQ_LM":
            batch["labels"] = pad(labels, IGNORE, length=self.answer_tokens)
        else:
            batch["labels"] = pad(labels, IGNORE, left, length)
            is_text = [[1] * (len(ids) - len(answer)) + [0] * len(answer) for ids, answer in zip(inputs, labels)]
            batch["text_mask"] = pad(is_text, 0, left, length).bool()
            answer_length = max(self.answer_tokens, *map(len, labels))
            batch["logits_to_keep"] = min(answer_length + 1, length) if self.label_only_logits else 0
        return batch
