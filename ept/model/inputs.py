"""From what a user calls the model with to what the frozen model is called with, and back.

The prompt takes the first `s` positions; the attention mask, position ids, token types and labels follow. Padding
never stands between prompt and text where the model would notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..embedding import position_ids_of
from .base_model import BaseModelFacts


def with_prompt(
    facts: BaseModelFacts,
    inputs: dict[str, Any],
    embeds: Tensor,
    mask: Tensor,
    s: int,
    generating: bool = False,
    mixed: bool = False,
) -> dict[str, Any]:
    """`inputs` with the embeddings `[batch, s + n, d]` of prompt and text, their mask and positions.

    Args:
        facts: how the model wants to be called. inputs: other arguments of the call; changed and returned.
        mask: `[batch, s + n]`. s: length of the (longest) prompt.
        generating: padding always goes before the prompt.
        mixed: prompts may be shorter than `s`, with padding before them.

    Raises:
        ValueError: the model cannot number that many positions.
    """
    limit, length = facts.position_limit, embeds.shape[1]
    if limit is not None and length > limit:
        raise ValueError(
            f"{s} prompt tokens and {length - s} text tokens make {length} positions, the model has {limit}: "
            f"truncate the text to {limit - s} tokens"
        )
    order = None
    if facts.pools_last:
        order = _padding_order(mask, last=False)
    elif mixed and (facts.classifies or "decoder_input_ids" in facts.forward_arguments):
        order = _padding_order(mask, last=True)  # the first row is pooled, or encoders count positions by index
    elif s and (generating or facts.prompt_beside_text):
        order = _beside_text_order(mask, s)
    if order is not None:
        embeds, mask = torch.take_along_dim(embeds, order[..., None], dim=1), mask.gather(1, order)
    inputs.update(inputs_embeds=embeds, attention_mask=mask)
    if facts.takes_position_ids:
        inputs["position_ids"] = _model_positions(facts, mask)
    if inputs.get("token_type_ids") is not None:
        types = extend(inputs["token_type_ids"], s, 0)
        inputs["token_type_ids"] = types if order is None else types.gather(1, order)
    return inputs


def after_cache(
    facts: BaseModelFacts, inputs: dict[str, Any], embeds: Tensor, mask: Tensor | None, ones: Tensor, s: int
) -> dict[str, Any]:
    """`inputs` for tokens that follow a cache of prompt and text: they are generated ones and get no update.

    Args:
        embeds: `[batch, new, d]`. mask: of text and new tokens, or of prompt, text and new tokens; None: all are
            real.
        ones: `[batch, new]`, in a mask's dtype.

    Raises:
        ValueError: the mask has another length.
    """
    cached, new = cached_length(facts, inputs), embeds.shape[1]
    mask = extend(ones, cached, 1) if mask is None else mask
    if mask.shape[1] == cached + new - s:
        mask = extend(mask, s, 1)
        order = _beside_text_order(mask, s) if s and facts.prompt_beside_text else None
        mask = mask if order is None else mask.gather(1, order)
    if mask.shape[1] != cached + new:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens; with {cached} cached positions and {new} new tokens it "
            f"must cover {cached + new - s} (text) or {cached + new} (prompt and text)"
        )
    inputs.update(inputs_embeds=embeds, attention_mask=mask)
    if facts.takes_position_ids:
        inputs["position_ids"] = _model_positions(facts, mask)[:, -new:]
    return inputs


def after_encoder(inputs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
    """`inputs` for a decoder whose encoder has run already, and has seen the prompt."""
    if mask is not None:
        states = inputs["encoder_outputs"][0]
        inputs["attention_mask"] = extend(mask, states.shape[1] - mask.shape[1], 1)
    return inputs


def cached_length(facts: BaseModelFacts, inputs: dict[str, Any]) -> int:
    """Positions in the key-value cache among `inputs`; 0 without one."""
    cache = inputs.get("past_key_values")
    if cache is None:  # newer models take the older name as well
        cache = inputs.get(cache_name(facts))
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def cache_name(facts: BaseModelFacts) -> str:
    """What the model calls its key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in facts.forward_arguments else "past_key_values"


def length_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = input_ids if input_ids is not None else inputs_embeds
    return 0 if given is None else given.shape[1]


def extend(values: Tensor, s: int, fill: int) -> Tensor:
    """`values` `[batch, n]` with `s` columns of `fill` before them."""
    return torch.cat([values.new_full((values.shape[0], s), fill), values], dim=1)


def label_span(labels: Tensor) -> int | None:
    """How many of the last positions need logits: those of the labels and the one before. None: all."""
    columns = (labels != -100).any(0).nonzero()
    if not len(columns):
        return None
    return min(labels.shape[1] - int(columns[0]) + 1, labels.shape[1])


def divide_loss(output: Any, labels: Tensor, num_items: Tensor | int, shifted: bool) -> None:
    """Turns the mean over this batch's labels into their sum over `num_items`, in place."""
    counted = (labels[:, 1:] if shifted and labels.dim() > 1 else labels).ne(-100).sum()
    factor = counted / num_items
    output["loss"] = output["loss"] * factor.to(output["loss"].device)


def count_new_tokens(inputs: dict[str, Any], n: int, default: Any) -> None:
    """Bounds on the length count input and new tokens; the base model, given embeddings, would count the prompt too.

    Raises:
        ValueError: `max_length` leaves no room after the `n` input tokens.
    """
    config = inputs.get("generation_config") or default
    for bound, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        given = inputs.pop(bound, None)
        if inputs.get(new) is not None or (given is None and getattr(config, new, None) is not None):
            continue
        value = given if given is not None else getattr(config, bound, None)
        if not value:
            continue
        if bound == "max_length" and value <= n:
            raise ValueError(
                f"max_length={value} leaves no room after {n} input tokens: raise it or use max_new_tokens"
            )
        inputs[new] = max(value - n, 0)


def with_input(input_ids: Tensor, sequences: Tensor) -> Tensor:
    """Generated `sequences` with the ids they continue before them."""
    repeats = sequences.shape[0] // input_ids.shape[0]
    return torch.cat([input_ids.to(sequences.device).repeat_interleave(repeats, dim=0), sequences], dim=1)


def _beside_text_order(mask: Tensor, s: int) -> Tensor | None:
    """Order that moves padding between prompt and text before the prompt; text keeps its places. None: nothing to
    move.
    """
    leading = (mask[:, s:].cumsum(1) == 0).sum(1, keepdim=True)  # [batch, 1]
    if mask.device.type == "cpu" and not bool(leading.any()):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(index < leading, index + s, torch.where(index < leading + s, index - leading, index))


def _padding_order(mask: Tensor, last: bool) -> Tensor:
    """Order that moves all padding behind (`last`) or before the real rows, which keep theirs."""
    return torch.sort(mask.bool().to(torch.int8), dim=1, stable=True, descending=last).indices


def _model_positions(facts: BaseModelFacts, mask: Tensor) -> Tensor:
    """Positions as the model numbers them; RoBERTa's begin after its padding index, which padding keeps."""
    positions, offset = position_ids_of(mask), facts.position_offset
    return torch.where(mask.bool(), positions + offset, offset - 1) if offset else positions
