"""Exports that need more than the adapter: its base model, or its task's texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..embedding import scaled_embedding
from ..model.adapter_files import is_same_name
from ..model.base_model import input_embedding, name_labels
from ..model.export import FoldedAdapter
from ..model.reading import examine
from ..model.vocabulary import add_prompt_tokens, check_update, untie
from ..tasks import local_task, read_rows, render
from ..tasks.files import READERS, read_text
from ..tasks.rows import with_all_columns
from ..utils.files import strict_json, write_atomically
from ..utils.messages import shown
from .config import ModelConfig, RunConfig
from .data import task_of
from .loading import load_base_model, load_tokenizer, outputs_of, task_type_of

logger = logging.getLogger(__name__)

TOKENS_NAME = "prompt_tokens.json"


def base_of(adapter: FoldedAdapter, config: RunConfig | None, model: str | None) -> tuple[ModelConfig, str]:
    """Describes the base model, which is that of a run's `config` or else `model`, and returns the adapter's task type.

    The base model named in an adapter is never used: it may come from anywhere. Raises ValueError if there is no other.
    """
    described = config.model if config is not None else ModelConfig(dtype="auto")
    described = described.model_copy(update={"name_or_path": model or described.name_or_path})
    if described.name_or_path is None:
        raise ValueError("the base model is not known: give --model")
    theirs = adapter.layer.config.base_model_name_or_path
    if theirs and not is_same_name(described.name_or_path, theirs):
        logger.warning("the adapter was made for %s, but the base model is %s", shown(theirs), described.name_or_path)
    return described, adapter.layer.config.task_type or task_type_of(described)


def texts_of(
    file: Path, config: RunConfig | None, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Reads input texts from a text file, one per line, or from a file of rows through the run's task or `template`.

    The tokenizer formats chats. Raises ValueError for a file without texts, an empty text (with its place), and rows
    without a template.
    """
    if file.suffix.lower() in READERS:
        if config is None and template is None:
            raise ValueError(
                f"{file} holds rows, but the adapter names no template: give a text file with one text per line"
            )
        task = task_of(config.data, tokenizer) if config is not None else local_task(str(template), ["0", "1"])
        texts = []
        for number, row in enumerate(with_all_columns(read_rows(file)), start=1):
            try:
                texts.append(render(task, row))
            except ValueError as error:
                raise ValueError(f"{file}, row {number}: {error}") from error
        return texts
    text = read_text(file).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if not text:
        raise ValueError(f"{file} is empty: every line is one input text")
    lines = text.split("\n")  # not splitlines, which also splits at U+2028 and the like
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise ValueError(f"{file}, line {empty[0]} is empty: every line is one input text")
    return lines


def base_with_heads(adapter: FoldedAdapter, model: ModelConfig, task_type: str, pad_token_id: int) -> Any:
    """Loads the base model with the modules that the adapter trained; raises ValueError if it has no such modules."""
    num_labels = outputs_of(adapter.heads, model) if task_type == "SEQ_CLS" else 2
    base: Any = load_base_model(model, task_type, num_labels, pad_token_id=pad_token_id)
    if adapter.heads:
        untie(base)  # else a trained head of a language model would also become its embedding
    if strange := base.load_state_dict(adapter.heads, strict=False).unexpected_keys:
        raise ValueError(
            f"{type(base).__name__} has no {strange[0]}, which the adapter has trained: give the adapter's own base "
            "model"
        )
    return base


def embed_texts(
    adapter: FoldedAdapter, model: ModelConfig, task_type: str, encoded: Sequence[list[int]], pad_token_id: int
) -> list[Tensor]:
    """Computes the base model's input for each text (token ids in `encoded`), a list of `[s + n, d]` on the CPU."""
    base = base_with_heads(adapter, model, task_type, pad_token_id)
    factor = examine(base, task_type).embedding_factor
    return adapter.embed(encoded, scaled_embedding(input_embedding(base), factor))


def write_as_tokens(adapter: FoldedAdapter, model: ModelConfig, task_type: str, folder: Path) -> dict[str, Any]:
    """Writes the base model with the adapter in its vocabulary and head, and `prompt_tokens.json`, which describes it.

    Returns the content of that file. Raises ValueError as `add_prompt_tokens` does, and for a head that is not the
    model's.
    """
    check_update(adapter.layer, task_type)
    if model.load_in_4bit:
        raise ValueError("--as-tokens needs the whole base model: leave model.load_in_4bit out")
    config, tokenizer = adapter.layer.config, load_tokenizer(model)
    base = base_with_heads(adapter, model, task_type, int(tokenizer.pad_token_id))
    if task_type == "SEQ_CLS":
        name_labels(base, config.label_words)
    text = add_prompt_tokens(base, tokenizer, adapter.layer.to(base.device), task_type)
    folder.mkdir(parents=True, exist_ok=True)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {**text._asdict(), "template": config.template, "label_words": config.label_words}
    write_atomically(folder / TOKENS_NAME, strict_json(about, indent=2) + "\n")
    return about
