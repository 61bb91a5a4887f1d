"""Chats as a task: the model's chat template renders all messages but the last, which is the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .files import Row
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""The usual name of a column of chats."""
SHARE_GPT = {"human": "user", "gpt": "assistant"}


def find_chats(rows: Sequence[Row]) -> str | None:
    """Finds the column of chats: `messages`, or the only one that holds messages, if no column is called label."""
    names = list(dict.fromkeys(name for row in rows[:10] for name in row))
    cells = {name: [row.get(name) for row in rows[:10]] for name in names}

    def holds(name: str, keys: set[str]) -> bool:
        firsts = (cell[0] for cell in cells[name] if isinstance(cell, list) and cell)
        return any(isinstance(first, Mapping) and keys <= {*first} for first in firsts)

    if MESSAGES in cells and holds(MESSAGES, set()):
        return MESSAGES
    found = [name for name in names if holds(name, {"role", "content"}) or holds(name, {"from", "value"})]
    return found[0] if len(found) == 1 and not {"label", "labels"} & {*map(str.casefold, names)} else None


def chat_task(
    column: str, tokenizer: PreTrainedTokenizerBase, *, metrics: Sequence[str], max_length: int, **fields: Any
) -> Task:
    """Makes a task from chats, lists of `{"role": ..., "content": ...}` that end with the assistant's answer.

    Raises ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"column '{column}' holds chats, but the model's tokenizer has no chat template: use another model"
        )

    def written(row: Mapping[str, Any]) -> dict[str, str]:
        messages = _messages(row[column], column)
        last = messages[-1]
        is_answered = last["role"] == "assistant"
        before = messages[:-1] if is_answered else messages
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        start = tokenizer.bos_token
        if start and prompt.startswith(start) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            prompt = prompt.removeprefix(start)  # the tokenizer adds it to every text
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
    """Returns the messages of a chat; plain text is a single user message. Raises ValueError if it is not a chat.

    Also reads a list in JSON, as in a cell of a csv file, and ShareGPT's `{"from": ..., "value": ...}`.
    """
    if isinstance(chat, str):
        if not chat.lstrip().startswith("[{"):
            return [{"role": "user", "content": chat}]
        try:
            chat = json.loads(chat)
        except json.JSONDecodeError as error:
            raise ValueError(f"column '{column}': a list of messages is not JSON ({error.msg}): correct it") from error
    messages = [_message(message) for message in chat] if isinstance(chat, list) else []
    for message in messages:
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise ValueError(f"column '{column}': a message is not {{'role': ..., 'content': text}}: correct it")
    if not any(message["role"] != "assistant" for message in messages):
        raise ValueError(f"column '{column}': this chat has no message for the assistant to answer")
    return messages


def _message(message: Any) -> dict[str, Any]:
    parts = message if isinstance(message, Mapping) else {}
    if {"from", "value"} <= {*parts}:
        return {"role": SHARE_GPT.get(str(parts["from"]), parts["from"]), "content": parts["value"]}
    return dict(parts)
