"""The arguments of the frozen model, made of those that a user calls with, and the way back.

The prompt takes the first `s` positions; the attention mask, position ids, token types and labels follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..embedding import lookup, position_ids_of
from .base_model import BaseModelFacts, input_embedding
from .mixed import embed_mixed

if TYPE_CHECKING:
    from .ept_model import EPTModel


def call_inputs(
    model: EPTModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    text_mask: Tensor | None,
    adapter_names: Sequence[str] | None,
    kwargs: dict[str, Any],
    generating: bool = False,
) -> dict[str, Any]:
    """Makes the base model's arguments of those that `model` was called with."""
    inputs = dict(kwargs)
    if inputs.pop("position_ids", None) is not None:
        warnings.warn("position_ids are counted from the attention mask; those given are ignored", stacklevel=3)
    if inputs.get("encoder_outputs") is not None:
        return after_encoder(inputs, attention_mask)
    embedding, layer = input_embedding(model.base_model), model._layer()
    if cached_length(model._facts, inputs):
        ids, table, ones = lookup(embedding, input_ids, inputs_embeds, None, layer.d)
        s = layer.config.num_virtual_tokens
        return after_cache(model._facts, inputs, table[ids], attention_mask, ones, s)
    if adapter_names is None:
        embeds, mask, _ = layer(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, text_mask=text_mask, embedding=embedding
        )
    else:
        ids, table, mask = lookup(embedding, input_ids, inputs_embeds, attention_mask, layer.d)
        layers: Any = dict(model.prompt_encoder.items())
        embeds, mask = embed_mixed(layers, adapter_names, ids, table, mask, text_mask)
    s = embeds.shape[1] - length_of(input_ids, inputs_embeds)
    return with_prompt(model._facts, inputs, embeds, mask, s, generating, mixed=adapter_names is not None)


def with_prompt(
    facts: BaseModelFacts,
    inputs: dict[str, Any],
    embeds: Tensor,
    mask: Tensor,
    s: int,
    generating: bool = False,
    mixed: bool = False,
) -> dict[str, Any]:
    """Returns `inputs` with the embeddings `[batch, s + n, d]` of prompt and text, their mask and positions.

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
    order = None  # Padding never stands between prompt and text where the model would notice.
    if facts.pools_last:
        order = _padding_order(mask, last=False)
    elif mixed and (facts.classifies or "decoder_input_ids" in facts.forward_arguments):
        order = _padding_order(mask, last=True)  # the first row is pooled, or encoders count positions by index
    elif s and (generating or facts.prompt_beside_text):
        order = _beside_text_order(mask, s)
    if order is not None:
        embeds, mask = torch.take_along_dim(embeds, order[..., None], dim=1), mask.gather(1, order)
    inputs.update(inputs_embeds=embeds, attention_mask=mask)
    if "position_ids" in facts.forward_arguments:
        inputs["position_ids"] = _model_positions(facts, mask)
    if inputs.get("token_type_ids") is not None:
        types = extend(inputs["token_type_ids"], s, 0)
        inputs["token_type_ids"] = types if order is None else types.gather(1, order)
    return inputs


def add_labels(
    facts: BaseModelFacts,
    inputs: dict[str, Any],
    labels: Tensor | None,
    s: int,
    causal: bool,
    logits_to_keep: int | None,
    training: bool,
) -> None:
    """Adds the labels to `inputs` behind `s` prompt tokens without one, and what follows from them for the logits.

    Args:
        causal: labels belong to the input's tokens.
        logits_to_keep: as in `EPTModel.forward`.
    """
    if labels is not None:
        labels = extend(labels, s, -100) if s > 0 else labels
        if causal and logits_to_keep is None and training and labels.device.type == "cpu":
            columns = (labels != -100).any(0).nonzero()
            if len(columns):  # the logits that the loss reads are those at the labels and one before
                logits_to_keep = min(labels.shape[1] - int(columns[0]) + 1, labels.shape[1])
    if logits_to_keep and "logits_to_keep" in facts.forward_arguments:
        inputs["logits_to_keep"] = logits_to_keep
        if causal and labels is not None:
            labels = labels[:, -logits_to_keep:]
    if labels is not None:
        inputs["labels"] = labels.contiguous()
        if training and "use_cache" in facts.forward_arguments:
            inputs.setdefault("use_cache", False)


def warn_without_text(text_mask: Tensor, attention_mask: Tensor | None) -> None:
    """Warns of a batch in which no token is input text."""
    text = text_mask if attention_mask is None else text_mask & attention_mask.bool()
    if not bool(text.any()):
        warnings.warn(
            "every token is a label, and labels get no low-rank update, so that A and B learn nothing: mask the "
            "input text with -100 in labels, say which tokens are input text by text_mask, or set r=0",
            stacklevel=3,
        )


def after_cache(
    facts: BaseModelFacts, inputs: dict[str, Any], embeds: Tensor, mask: Tensor | None, ones: Tensor, s: int
) -> dict[str, Any]:
    """Returns `inputs` for tokens that follow a cache of prompt and text: generated ones, which get no update.

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
    if "position_ids" in facts.forward_arguments:
        inputs["position_ids"] = _model_positions(facts, mask)[:, -new:]
    return inputs


def after_encoder(inputs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
    """Returns `inputs` for a decoder whose encoder has run already, and has seen the prompt."""
    if mask is not None:
        states = inputs["encoder_outputs"][0]
        inputs["attention_mask"] = extend(mask, states.shape[1] - mask.shape[1], 1)
    return inputs


def cached_length(facts: BaseModelFacts, inputs: dict[str, Any]) -> int:
    """Counts the positions in the key-value cache among `inputs`; 0 without one."""
    cache = inputs.get("past_key_values")
    if cache is None:  # newer models take the older name as well
        cache = inputs.get(cache_name(facts))
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def cache_name(facts: BaseModelFacts) -> str:
    """Names the model's argument for a key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in facts.forward_arguments else "past_key_values"


def length_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Returns the length n of what a user gave; 0 for nothing."""
    given = input_ids if input_ids is not None else inputs_embeds
    return 0 if given is None else given.shape[1]


def extend(values: Tensor, s: int, fill: int) -> Tensor:
    """Puts `s` columns of `fill` before `values` `[batch, n]`."""
    return torch.cat([values.new_full((values.shape[0], s), fill), values], dim=1)


def divide_loss(output: Any, labels: Tensor, num_items: Tensor | int, shifted: bool) -> None:
    """Turns the mean over this batch's labels into their sum over `num_items`, in place."""
    counted = (labels[:, 1:] if shifted and labels.dim() > 1 else labels).ne(-100).sum()
    factor = counted / num_items
    output["loss"] = output["loss"] * factor.to(output["loss"].device)


def _beside_text_order(mask: Tensor, s: int) -> Tensor | None:
    """Finds the order that moves padding between prompt and text before the prompt; None: there is none to move."""
    leading = (mask[:, s:].cumsum(1) == 0).sum(1, keepdim=True)  # [batch, 1]
    if mask.device.type == "cpu" and not bool(leading.any()):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(index < leading, index + s, torch.where(index < leading + s, index - leading, index))


def _padding_order(mask: Tensor, last: bool) -> Tensor:
    """Finds the order that moves all padding behind (`last`) or before the real rows, which keep theirs."""
    return torch.sort(mask.bool().to(torch.int8), dim=1, stable=True, descending=last).indices


def _model_positions(facts: BaseModelFacts, mask: Tensor) -> Tensor:
    """Numbers positions as the model does; RoBERTa's begin after its padding index, which padding keeps."""
    positions, offset = position_ids_of(mask), facts.position_offset
    return torch.where(mask.bool(), positions + offset, offset - 1) if offset else positions
