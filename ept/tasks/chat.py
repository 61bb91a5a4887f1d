"""Chats as a task: the model's chat template writes the messages before the last one, which is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .files import Row
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""The usual name of a column of chats."""


def has_chats(rows: Sequence[Row], column: str = MESSAGES) -> bool:
    """Tells whether a column holds lists of messages."""
    cells = [row.get(column) for row in rows[:10]]
    return any(isinstance(cell, list) and cell and isinstance(cell[0], Mapping) for cell in cells)


def chat_task(
    column: str, tokenizer: PreTrainedTokenizerBase, *, metrics: Sequence[str], max_length: int, **fields: Any
) -> Task:
    """Makes a task of chats, lists of `{"role": ..., "content": ...}` that end with what the assistant answers.

    Raises ValueError where the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"column '{column}' holds chats, and the model's tokenizer has no chat template: take another")

    def written(row: Mapping[str, Any]) -> dict[str, str]:
        messages = _messages(row[column], column)
        last = messages[-1]
        is_answered = last["role"] == "assistant"
        before = messages[:-1] if is_answered else messages
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        start = tokenizer.bos_token
        if start and prompt.startswith(start) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            prompt = prompt.removeprefix(start)  # which the tokenizer puts before every text
        return {"prompt": prompt, "answer": last["content"] if is_answered else ""}

    return Task(
        template="{prompt}",
        target_template="{answer}",
        label_words=(),
        metrics=tuple(metrics),
        max_length=max_length,
        label_column=column,
        source_columns=(column,),
        preprocess=written,
        is_local=True,
        **fields,
    )


def _messages(chat: Any, column: str) -> list[dict[str, str]]:
    """Checks a chat; a text alone is a user's only message. Raises ValueError for what is none."""
    if isinstance(chat, str):
        return [{"role": "user", "content": chat}]
    messages = chat if isinstance(chat, list) else []
    for message in messages:
        parts = message if isinstance(message, Mapping) else {}
        if not (isinstance(parts.get("role"), str) and isinstance(parts.get("content"), str)):
            raise ValueError(f"column '{column}': a message is no {{'role': ..., 'content': text}}")
    if not any(message["role"] != "assistant" for message in messages):
        raise ValueError(f"column '{column}': nobody asks the assistant in this chat")
    return [dict(message) for message in messages]
