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
    """Makes the base model's arguments of those that `model` was called with.

    Tokens that follow a cache of prompt and text are generated ones: they get neither prompt nor update. Their mask
    covers text and new tokens, or prompt, text and new tokens. A forward call without a mask hands none on: to learn
    that nothing is masked, transformers would wait for an accelerator.

    Raises:
        ValueError: the mask has another length, or the model cannot number that many positions.
    """
    inputs = dict(kwargs)
    positions = inputs.pop("position_ids", None)
    if positions is not None and not _counts_tokens(positions, attention_mask):
        warnings.warn("position_ids are counted from the attention mask; those given are ignored", stacklevel=3)
    if (encoded := inputs.get("encoder_outputs")) is not None:  # the encoder has run already, and has seen the prompt
        if attention_mask is not None:
            inputs["attention_mask"] = extend(attention_mask, encoded[0].shape[1] - attention_mask.shape[1], 1)
        return inputs
    facts, embedding, layer = model._facts, input_embedding(model.base_model), model._layer()
    if cached := cached_length(facts, inputs):
        ids, table, ones = lookup(embedding, input_ids, inputs_embeds, None, layer.d)
        mask = extend(ones, cached, 1) if attention_mask is None else attention_mask
        s, new = layer.config.num_virtual_tokens, ids.shape[1]
        if mask.shape[1] == cached + new - s:
            mask = extend(mask, s, 1)
            order = _beside_text_order(mask, s) if s and facts.prompt_beside_text else None
            mask = mask if order is None else mask.gather(1, order)
        if mask.shape[1] != cached + new:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens; with {cached} cached positions and {new} new tokens it "
                f"must cover {cached + new - s} (text) or {cached + new} (prompt and text)"
            )
        inputs.update(inputs_embeds=table[ids], attention_mask=mask)
        if "position_ids" in facts.forward_arguments:
            inputs["position_ids"] = _model_positions(facts, mask)[:, -new:]
        return inputs
    if adapter_names is None:
        embeds, mask, _ = layer(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, text_mask=text_mask, embedding=embedding
        )
    else:
        ids, table, mask = lookup(embedding, input_ids, inputs_embeds, attention_mask, layer.d)
        layers: Any = dict(model.prompt_encoder.items())
        embeds, mask = embed_mixed(layers, adapter_names, ids, table, mask, text_mask)
    s = embeds.shape[1] - length_of(input_ids, inputs_embeds)
    mixed = adapter_names is not None
    return _with_prompt(facts, inputs, embeds, mask, s, generating, mixed, padded=mixed or attention_mask is not None)


def _with_prompt(
    facts: BaseModelFacts,
    inputs: dict[str, Any],
    embeds: Tensor,
    mask: Tensor,
    s: int,
    generating: bool,
    mixed: bool,
    padded: bool,
) -> dict[str, Any]:
    """Returns `inputs` with the embeddings `[batch, s + n, d]` of prompt and text, their mask and positions.

    While `generating` padding always goes before the prompt; `mixed` prompts may be shorter than `s`, padded in front.
    Where nothing can be `padded` a forward call gets no mask.
    """
    limit, length = facts.position_limit, embeds.shape[1]
    if limit is not None and length > limit:
        raise ValueError(
            f"{s} prompt tokens and {length - s} text tokens make {length} positions, the model has {limit}: "
            f"truncate the text to {limit - s} tokens"
        )
    order = None  # Padding never stands between prompt and text where the model would notice.
    if not padded:
        pass
    elif facts.pools_last or (mixed and (facts.classifies or "decoder_input_ids" in facts.forward_arguments)):
        # All padding to one end: the last row is pooled, or the first one, or encoders count positions by index.
        is_real = mask.bool().to(torch.int8)
        order = torch.sort(is_real, dim=1, stable=True, descending=not facts.pools_last).indices
    elif s and (generating or facts.prompt_beside_text):
        order = _beside_text_order(mask, s)
    if order is not None:
        embeds, mask = torch.take_along_dim(embeds, order[..., None], dim=1), mask.gather(1, order)
    inputs["inputs_embeds"] = embeds
    if padded or generating:  # generate() counts from it
        inputs["attention_mask"] = mask
    if "position_ids" in facts.forward_arguments:
        inputs["position_ids"] = _model_positions(facts, mask)
    if inputs.get("token_type_ids") is not None:
        types = extend(inputs["token_type_ids"], s, 0)
        inputs["token_type_ids"] = types if order is None else types.gather(1, order)
    return inputs


def cached_length(facts: BaseModelFacts, inputs: dict[str, Any]) -> int:
    """Counts the positions in the key-value cache among `inputs`; 0 without one."""
    cache: Any = inputs.get("past_key_values")
    if cache is None:  # newer models take the older name as well
        cache = inputs.get(cache_name(facts))
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


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


def divide_loss(output: Any, labels: Tensor, num_items: Tensor | int, shifted: bool, auxiliary: float = 0.0) -> None:
    """Turns the mean over this batch's labels into their sum over `num_items`, in place; 0 without any label.

    `auxiliary` is the weight of `output["aux_loss"]` in the loss, which routers of experts add and which stays.
    """
    loss = output["loss"]
    counted = (labels[:, 1:] if shifted and labels.dim() > 1 else labels).ne(-100).sum().to(loss.device)
    other = auxiliary * output["aux_loss"].to(loss.device) if output.get("aux_loss") is not None else 0.0
    mean = torch.where(counted > 0, loss - other, 0.0)  # a mean over no label is NaN
    output["loss"] = mean * (counted / num_items) + other


def shortened(output: Any, logits_to_keep: Tensor | int) -> Any:
    """Leaves of `output["logits"]` what `logits_to_keep` names, where a model has computed all; 0 leaves all."""
    if isinstance(logits_to_keep, Tensor):
        output["logits"] = output["logits"][:, logits_to_keep]
    elif logits_to_keep:
        output["logits"] = output["logits"][:, -logits_to_keep:]
    return output


def _counts_tokens(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Tells whether positions that a caller gave are those of real tokens counted from 0."""
    if position_ids.dim() != 2:
        return False
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if real.dim() != 2 or real.shape[1] != position_ids.shape[1]:
        return False
    return bool(((position_ids == position_ids_of(real)) | ~real.bool()).all())


def _beside_text_order(mask: Tensor, s: int) -> Tensor | None:
    """Finds the order that moves padding between prompt and text before the prompt; None: there is none to move."""
    leading = (mask[:, s:].cumsum(1) == 0).sum(1, keepdim=True)  # [batch, 1]
    if mask.device.type == "cpu" and not bool(leading.any()):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(index < leading, index + s, torch.where(index < leading + s, index - leading, index))


def _model_positions(facts: BaseModelFacts, mask: Tensor) -> Tensor:
    """Numbers positions as the model does; RoBERTa's begin after its padding index, which padding keeps."""
    positions, offset = position_ids_of(mask), facts.position_offset
    return torch.where(mask.bool(), positions + offset, offset - 1) if offset else positions
