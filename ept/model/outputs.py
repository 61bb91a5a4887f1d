"""Outputs of the base model for the caller's tokens: without the prompt's rows, in the caller's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .facts import TOKEN_OUTPUTS, BaseModelFacts
from .layout import moved_back


def of_tokens(output: Any, model: Any, facts: BaseModelFacts, order: Tensor | None, s: int) -> Any:
    """Keeps only the caller's tokens in outputs with one entry per position, in place; returns `output`.

    This includes hidden states and attentions. A causal model's logits keep the prompt's rows, as in PEFT. A pooled
    output, which includes the prompt, is recomputed from the text, or dropped if the model pools in another way.

    Args:
        output: of `model` for `[batch, s + n]` positions.
        order: in which `layout.arrangement` put them, or None.
    """
    if facts.task_type == "CAUSAL_LM":
        if order is not None:
            output["logits"] = moved_back(output["logits"], order)
        return output
    if facts.task_type not in TOKEN_OUTPUTS:
        return output
    if facts.task_type == "FEATURE_EXTRACTION" and output.get("pooler_output") is not None:
        text_first = output["last_hidden_state"][:, s:]
        output["pooler_output"] = model.pooler(text_first) if facts.has_pooler else None
    length = output[TOKEN_OUTPUTS[facts.task_type][0]].shape[1]
    for name in TOKEN_OUTPUTS[facts.task_type]:
        output[name] = moved_back(output[name], order)[:, s:]
    if output.get("hidden_states") is not None:
        states = output["hidden_states"]
        output["hidden_states"] = tuple(moved_back(x, order)[:, s:] if x.shape[1] == length else x for x in states)
    if output.get("attentions") is not None:
        output["attentions"] = tuple(_between_tokens(x, order, s, length) for x in output["attentions"])
    return output


def span_loss(output: Any, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Computes the loss of an answer's first and last token in the text, as transformers' models do.

    A position beyond the text is ignored.
    """
    n = output["start_logits"].shape[1]
    losses = []
    for name, positions in (("start_logits", start_positions), ("end_logits", end_positions)):
        positions = positions.squeeze(-1) if positions.dim() > 1 else positions
        logits = output[name]
        losses.append(cross_entropy(logits, positions.to(logits.device).clamp(0, n), ignore_index=n))
    return torch.stack(losses).mean()


def _between_tokens(attention: Tensor, order: Tensor | None, s: int, length: int) -> Tensor:
    """Keeps the caller's tokens in weights `[batch, heads, s + n, s + n]`; other shapes are left alone."""
    if attention.dim() != 4 or attention.shape[2:] != (length, length):
        return attention
    for dimension in (2, 3):
        attention = moved_back(attention.transpose(1, dimension), order)[:, s:].transpose(1, dimension)
    return attention
