"""From a row in a file to a padded batch, with one layout per task type, shared by training and evaluation.

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

IGNORE = -100  # the label of a position that the loss ignores
TEXT_IDS = "text_ids"
"""Column with the tokens of each row's `text`, in a dataset that was fitted to the length limit."""
WEIGHT, WEIGHTS = "weight", "weights"
"""Optional column with the weight of a row's loss, and the batch entry with the weights of its rows."""


class FittedText(NamedTuple):
    """A row's text within the length limit, its tokens, and whether it was cut to fit."""

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
        # Tokenised as " label" after a text: a tokenizer may treat the start of a string differently.
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
    # A decoder's answers have no end token: it would be half of the loss of a one-token answer and say nothing about
    # the label. But if one label begins another ("not", "not at all"), it tells them apart, so all get one.
    if any(a is not b and b[: len(a)] == a for a in encoded for b in encoded):
        if tokenizer.eos_token_id is None:
            raise ValueError("one label begins another and the tokenizer has no end token: use other label words")
        encoded = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return encoded


def _encode_targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises the targets of an encoder-decoder, adding the end token if the tokenizer does not."""
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
    """Tokenises free-text answers, each with an end token unless it is cut to `max_tokens` (None: never cut).

    `spaced`: a decoder's answer follows a space, as after most texts but not in a chat.
    """
    if task_type == "SEQ_2_SEQ_LM":
        encoded = _encode_targets(tokenizer, texts)
    else:
        start = "a " if spaced else ""  # tokenised as " answer" after a text
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
    """Renders and tokenises each row, twice if it is too long. `max_length` includes start and end tokens.

    `rows` are raw rows of a data file, or rows of a `TaskData` split.

    Args:
        numbers: row numbers in the file, needed if some of its rows are missing here.

    Raises:
        ValueError: a row has no text, or is too long and must not be truncated; names `source`, the row (counted from
            1), its tokens and the limit.
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
    if too_long and (not truncate or task.is_chat):  # cutting a chat would cut its question
        number = numbers[too_long[0]]
        raise ValueError(
            f"{source}, row {number}: the text has {len(fitted[too_long[0]].ids)} tokens, but the limit is "
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
    """Returns a row's number in its file: rows of a `TaskData` split carry it, others are in file order."""
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

    For SEQ_CLS, a regression's `labels` are the numbers themselves; `outputs`, if given, maps each class to the index
    of its output. If the argument `labels` is empty, each row's `target` is its answer, of at most `max_answer` tokens
    and `spaced` as in `encode_answers`.
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
    """Pads sequences into one int64 tensor [B, n]; n is the length of the longest, and at least `length`."""
    length = max(length, *map(len, sequences))
    fill = [[value] * (length - len(sequence)) for sequence in sequences]
    return torch.tensor([[*f, *s] if left else [*s, *f] for f, s in zip(fill, sequences)], dtype=torch.long)


@dataclass
class Collator:
    """Collator of `encode_split`'s rows into a batch: `input_ids`, `labels`, and `attention_mask` [B, n] only if a row
    is padded, because a model has to wait for the accelerator to learn that a mask is all ones. Rows with a `weight`
    add `weights` [B].

    CAUSAL_LM adds `logits_to_keep` (an int), which covers the labels of the batch and the position before them, so
    that the output head runs only there (0: all positions); and `text_mask` [B, n], so that counting a row's answers
    needs no wait for the accelerator.

    Args:
        pad_to_multiple_of: rounds n up to a multiple of this, so that a compiled step sees few lengths.
        answer_tokens: length of the longest answer in the data; labels are padded to it (and logits kept) for the
            same reason. 0: the longest of each batch.
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
