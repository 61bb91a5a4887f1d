"""The batches of a profile: random ids of given or drawn lengths, or the rows of a real dataset."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..runs.loading import load_tokenizer
from ..tasks import read_rows
from ..tasks.encoding import Collator, encode_split, encode_texts
from ..tasks.inference import find_texts
from ..tasks.rows import as_text

if TYPE_CHECKING:
    from ..runs.config import RunConfig

ANSWER_TOKENS = 2  # of a random row's answer
_FIRST_ID = 3  # lower ids are special tokens in most vocabularies

Row = dict[str, list[int]]


def random_rows(count: int, task_type: str, vocab_size: int, length: int, varied: bool, seed: int) -> list[Row]:
    """Draws rows of random ids, in the form of `encode_split`.

    A row has `length` tokens or, if `varied`, a number drawn uniformly from a quarter of it to all of it. This includes
    a decoder's answer, but not an encoder-decoder's.

    Raises:
        ValueError: the length leaves no room for text beside the answer.
    """
    if length <= 2 * ANSWER_TOKENS:
        raise ValueError(f"length={length} is too short: at least {2 * ANSWER_TOKENS + 1} tokens per row are needed")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        shortest = max(length // 4, ANSWER_TOKENS + 1) if varied else length
        tokens = int(torch.randint(shortest, length + 1, (1,), generator=generator))
        ids = torch.randint(_FIRST_ID, vocab_size, (tokens,), generator=generator).tolist()
        answer = torch.randint(_FIRST_ID, vocab_size, (ANSWER_TOKENS,), generator=generator).tolist()
        if task_type == "CAUSAL_LM":
            answer = ids[-ANSWER_TOKENS:]
        rows.append({"input_ids": ids, "labels": answer})
    return rows


def make_batches(
    rows: Sequence[Row],
    *,
    batch: int,
    count: int,
    task_type: str,
    pad_token_id: int,
    padding: str,
    width: int,
    all_logits: bool,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Makes `count` batches of `batch` rows in order, starting again when the rows are used up.

    Args:
        padding: `"none"` (all rows have the same length), `"longest"` of each batch, or `"max_length"`: to `width`.
        all_logits: a decoder's logits at every position instead of only at the labels.

    Raises:
        ValueError: there are fewer rows than a batch needs, or rows of unequal length with `padding="none"`.
    """
    if len(rows) < batch:
        raise ValueError(f"{len(rows)} rows do not fill a batch of {batch}: take a smaller batch or more data")
    if padding == "none" and len({len(row["input_ids"]) for row in rows}) > 1:
        raise ValueError("padding=none needs rows of one length, but these differ: use longest or max_length")
    multiple = width if padding == "max_length" else None
    collate = Collator(task_type, pad_token_id, pad_to_multiple_of=multiple, label_only_logits=not all_logits)
    in_order = itertools.cycle(rows)
    collated = [collate(list(itertools.islice(in_order, batch))) for _ in range(count)]
    return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()} for made in collated]


def data_rows(run: RunConfig, file: Path | None, task_type: str, length: int, seed: int, count: int) -> list[Row]:
    """Draws at most `count` rows from a run's train split, or from the text columns of `file` if given.

    Texts are cut to `length` tokens. Those of a file get random answers, as only their length matters; a decoder's
    answer follows the text.

    Raises:
        ValueError: no tokenizer is named, or the file has no text.
    """
    if run.model.name_or_path is None and run.model.tokenizer_name_or_path is None:
        raise ValueError("a shape has no tokenizer of its own: name one with --tokenizer to measure on data")
    tokenizer = load_tokenizer(run.model)
    if file is None:
        from ..runs.data import load_run_data

        data = load_run_data(run.data.model_copy(update={"max_length": length}), tokenizer, task_type).data
        chosen = data.train.shuffle(seed=seed).select(range(min(count, len(data.train))))
        return list(encode_split(chosen, tokenizer, data.labels, task_type))
    read = read_rows(file, run.data.encoding)
    columns = find_texts(read, str(file), run.data.text_columns)
    generator = torch.Generator().manual_seed(seed)
    drawn = [read[index] for index in torch.randperm(len(read), generator=generator)[:count].tolist()]
    texts = [" ".join(as_text(column, row.get(column)) for column in columns) for row in drawn]
    rows = []
    for ids in encode_texts(tokenizer, texts, task_type):
        answer = torch.randint(_FIRST_ID, len(tokenizer), (ANSWER_TOKENS,), generator=generator).tolist()
        rows.append({"input_ids": ids[:length] + (answer if task_type == "CAUSAL_LM" else []), "labels": answer})
    return rows
