"""The frozen model's arguments, built from the user's.

The prompt takes the first `s` positions; the attention mask, position ids, token types and labels follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..embedding import lookup, position_ids_of
from .facts import BaseModelFacts
from .layout import APART, BEHIND, BESIDE, FRONT, arrangement, has_gaps, moved, numbered
from .mixed import check_names, embed_following, embed_mixed, prompt_mask

if TYPE_CHECKING:
    from .ept_model import EPTModel
    from .packing import Packing


# Arguments with one entry per token, and their value in the prompt's rows; None: the first token's value.
OF_TOKENS: dict[str, int | None] = {
    "token_type_ids": 0,
    "bbox": 0,  # as for special tokens
    "langs": None,
    "global_attention_mask": 1,  # every token sees the prompt, however far away
    "shift_labels": -100,
}
# Arguments that do not concern the input's tokens, and prefixes of such names.
_OTHERS = ("labels", "start_positions", "end_positions", "next_sentence_label", "num_items_in_batch", "logits_to_keep")
_OTHER_PREFIXES = ("decoder_", "encoder_", "cross_", "output_", "past_", "cache", "head_mask", "mems", "state")
_STATES = ("cache_params", "state", "mems")  # what was read before, in a form other than keys and values of positions


class BaseInputs(dict[str, Any]):
    """The base model's arguments.

    Attributes:
        s: number of prompt rows.
        order: of the columns, if texts were moved.
        prompt_logits: of a prompt that was read separately, if wanted.
        packing: how texts were put into rows.
    """

    s: int = 0
    order: Tensor | None = None
    prompt_logits: Tensor | None = None
    packing: Packing | None = None


def call_inputs(
    model: EPTModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    text_mask: Tensor | None,
    adapter_names: Sequence[str] | None,
    kwargs: dict[str, Any],
    generating: bool = False,
    prompt_cache: bool = False,
) -> BaseInputs:
    """Builds the base model's arguments from those of a call of `model`.

    Tokens that follow a cache of prompt and text count as generated, except those marked in `text_mask`: they get no
    prompt, and the update only with `update_scope="all"`. Their mask covers text and new tokens, or prompt, text and
    new tokens. A forward call without a mask passes none on: to find that nothing is masked, transformers would
    synchronise with an accelerator.

    Args:
        generating: for `generate`; a causal model's padding goes before the prompt.
        prompt_cache: the prompt stays first, because its keys and values are cached.

    Raises:
        ValueError: the mask has another length, the model has too few positions, it reads padding as text or special
            tokens only from ids, or it is unclear whether an argument's entries follow the tokens.
    """
    inputs = BaseInputs(kwargs)
    positions = inputs.pop("position_ids", None)
    if positions is not None and not _counts_tokens(positions, attention_mask):
        warnings.warn("position_ids are counted from the attention mask; those given are ignored", stacklevel=3)
    facts, embedding, layer = model._facts, model._embedding(), model._layer()
    if facts.ids_alone and input_ids is not None:
        _check_ids(type(model.base_model).__name__, facts.ids_alone, input_ids)
    if states := [name for name in _STATES if inputs.get(name) is not None]:
        raise ValueError(
            f"{states[0]} does not show how much {type(model.base_model).__name__} has read, and tokens after it get "
            "no prompt: pass the whole text without it, or call generate, which handles it"
        )
    layers: Any = dict(model.prompt_encoder.items())
    encoded = inputs.get("encoder_outputs")
    rows = next((x for x in (input_ids, inputs_embeds, encoded and encoded[0]) if x is not None), ())
    names = [model.active_adapter] * len(rows) if adapter_names is None else list(adapter_names)
    if adapter_names is not None and len(rows):
        check_names(names, layers, len(rows))
    if encoded is not None:  # the encoder has already run, with the prompt
        _mask_encoded(facts, inputs, attention_mask, prompt_mask(layers, names, encoded[0].device))
        return inputs
    if cached := cached_length(facts, inputs):
        ids, table, ones = lookup(embedding, input_ids, inputs_embeds, None, layer.d)
        in_front = prompt_mask(layers, names, ones.device)
        s, new = in_front.shape[1], ids.shape[1]
        mask = extend(ones, cached - s, 1) if attention_mask is None else attention_mask
        if mask.shape[1] == cached + new - s:
            mask = torch.cat([in_front.to(mask), mask], dim=1)
            may_be_padded = attention_mask is not None or adapter_names is not None
            if facts.padding in (None, BEHIND) and may_be_padded and not bool(mask.all()):
                raise ValueError(
                    f"{type(model.base_model).__name__} counts positions by index, so padding would move the tokens "
                    "after it to other positions: give rows of one length, or the whole text at once"
                )
            mask = moved(mask, arrangement(mask, s, facts.padding or APART))
        if attention_mask is not None and not facts.splits_prompt and has_gaps(mask):
            raise ValueError(
                f"{type(model.base_model).__name__} counts positions by index or sees a window of them, so padding "
                "would change how the tokens after it are read: pad on the left, give rows of one length, or the "
                "whole text at once"
            )
        if mask.shape[1] != cached + new:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens; with {cached} cached positions and {new} new tokens it "
                f"must cover {cached + new - s} (text) or {cached + new} (prompt and text)"
            )
        following = position_ids_of(mask)[:, -new:]
        embeds = embed_following(layers, names, ids, table, following, text_mask)
        inputs.update(inputs_embeds=embeds, attention_mask=mask)
        if facts.position_offset is not None and "position_ids" in facts.forward_arguments:
            inputs["position_ids"] = numbered(mask, facts.position_offset)[:, -new:]
        return inputs
    if attention_mask is None and input_ids is not None and facts.task_type == "SEQ_CLS" and facts.padding == FRONT:
        attention_mask = _up_to_last_token(input_ids, model.base_model.config.pad_token_id)
    if adapter_names is None:
        embeds, mask, _ = layer(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, text_mask=text_mask, embedding=embedding
        )
    else:
        ids, table, mask = lookup(embedding, input_ids, inputs_embeds, attention_mask, layer.d)
        embeds, mask = embed_mixed(layers, adapter_names, ids, table, mask, text_mask)
    inputs.s = embeds.shape[1] - length_of(input_ids, inputs_embeds)
    padding = facts.padding
    if facts.task_type == "CAUSAL_LM" and (generating or prompt_cache):
        padding = APART if prompt_cache else BESIDE if padding == BESIDE else None
    is_padded = adapter_names is not None or attention_mask is not None
    _with_prompt(type(model.base_model).__name__, facts, inputs, embeds, mask, padding, is_padded)
    if generating and "attention_mask" in facts.forward_arguments:  # generate() counts from it
        inputs.setdefault("attention_mask", mask)
    return inputs


def _with_prompt(
    name: str,
    facts: BaseModelFacts,
    inputs: BaseInputs,
    embeds: Tensor,
    mask: Tensor,
    padding: str | None,
    is_padded: bool,
) -> None:
    """Adds the embeddings `[batch, s + n, d]` of prompt and text to `inputs`, with their padding where it may be.

    The mask, positions and other arguments with one entry per token follow. Unless something is padded, there is no
    mask.
    """
    limit, length, s = facts.position_limit, embeds.shape[1], inputs.s
    if limit is not None and length > limit:
        raise ValueError(
            f"{s} prompt tokens and {length - s} text tokens make {length} positions, but the model has {limit}: "
            f"truncate the text to {limit - s} tokens"
        )
    order = None
    if is_padded and padding is None:
        if not bool(mask.all()):
            raise ValueError(
                f"{name} reads padding as if it were text, so a row's result would depend on the others: give rows "
                "of one length, or one row at a time"
            )
        is_padded = facts.needs_mask
    elif is_padded and padding is not None:
        order = arrangement(mask, s, padding)
    embeds, mask = moved(embeds, order), moved(mask, order)
    inputs["inputs_embeds"] = embeds
    if is_padded or facts.needs_mask:
        inputs["attention_mask"] = mask
        if facts.position_offset is not None and "position_ids" in facts.forward_arguments:
            inputs["position_ids"] = numbered(mask, facts.position_offset)
    for key, value in list(inputs.items()):
        if key in OF_TOKENS and isinstance(value, Tensor):
            fill = OF_TOKENS[key]
            front = value[:, :1].expand(-1, s, *value.shape[2:])
            front = front if fill is None else torch.full_like(front, fill)
            inputs[key] = moved(torch.cat([front, value], dim=1), order)
        elif isinstance(value, Tensor) and key not in ("inputs_embeds", "attention_mask", "position_ids"):
            _check_argument(key, value, facts, length - s)
    if padding != BESIDE:  # which leaves texts in their columns
        inputs.order = order


def _mask_encoded(facts: BaseModelFacts, inputs: BaseInputs, attention_mask: Tensor | None, in_front: Tensor) -> None:
    """Restores the mask with which `encoder_outputs` were computed, over prompt and text in their order."""
    length, s = inputs["encoder_outputs"][0].shape[1], in_front.shape[1]
    n = length - s if attention_mask is None else attention_mask.shape[1]
    if length != s + n:
        raise ValueError(
            f"encoder_outputs have {length} rows, but {s} prompt tokens and {n} text tokens make {s + n}: use "
            "encoder_last_hidden_state from this model's forward, which has read the prompt"
        )
    if attention_mask is None and bool(in_front.all()):
        return
    text = in_front.new_ones(len(in_front), n, dtype=torch.int64) if attention_mask is None else attention_mask
    mask = torch.cat([in_front.to(text), text], dim=1)
    inputs["attention_mask"] = moved(mask, arrangement(mask, s, facts.padding or APART))


def _up_to_last_token(input_ids: Tensor, pad_token_id: int | None) -> Tensor | None:
    """Makes a mask of texts up to their last token, for a classifier that finds this token in the ids."""
    if pad_token_id is None:
        return None
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * input_ids.ne(pad_token_id)).amax(1, keepdim=True) if input_ids.shape[1] else 0
    is_text = columns <= last
    can_ask = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()  # never wait for an accelerator
    return None if can_ask and bool(is_text.all()) else is_text.to(torch.int64)


def _check_ids(name: str, ids_alone: Sequence[int], input_ids: Tensor) -> None:
    """Refuses tokens that a model looks for in the ids, because with a prompt it reads embeddings."""
    unlike = torch.isin(input_ids, torch.tensor(ids_alone, device=input_ids.device))
    if bool(unlike.any()):
        raise ValueError(
            f"the text contains token {int(input_ids[unlike][0])}, which {name} reads differently from ids than from "
            "embeddings, as a prompt needs: remove it from the text"
        )


def _check_argument(name: str, value: Tensor, facts: BaseModelFacts, n: int) -> None:
    """Refuses a tensor that may have one entry per token (`n`), because its entries for the prompt are unknown."""
    if name in _OTHERS or name.startswith(_OTHER_PREFIXES):
        return
    if name in facts.forward_arguments or n in value.shape[1:]:
        raise ValueError(
            f"{name} {list(value.shape)} cannot be passed on: its values for the prompt's rows are not known. Leave "
            "it out, or use a model that needs none"
        )


def cached_length(facts: BaseModelFacts, inputs: dict[str, Any]) -> int:
    """Counts the positions in the key-value cache in `inputs`; 0 without one, or for an encoder-decoder."""
    if "decoder_input_ids" in facts.forward_arguments:  # the encoder reads the text
        return 0
    cache = cache_among(facts, inputs)
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def cache_among(facts: BaseModelFacts, inputs: dict[str, Any]) -> Any:
    """Returns the key-value cache in `inputs`, under either name, or None."""
    cache = inputs.get("past_key_values")  # newer models accept the older name as well
    return inputs.get(cache_name(facts)) if cache is None else cache


def cache_name(facts: BaseModelFacts) -> str:
    """Returns the name of the model's argument for a key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in facts.forward_arguments else "past_key_values"


def length_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Returns the length n of the user's input; 0 if there is none."""
    given = input_ids if input_ids is not None else inputs_embeds
    return 0 if given is None else given.shape[1]


def extend(values: Tensor, s: int, fill: int) -> Tensor:
    """Prepends `s` columns of `fill` to `values` `[batch, n]`."""
    return torch.cat([values.new_full((values.shape[0], s), fill), values], dim=1)


def divide_loss(output: Any, labels: Tensor, num_items: Tensor | int, shifted: bool, auxiliary: float = 0.0) -> None:
    """Replaces the mean over this batch's labels by their sum over `num_items`, in place; 0 without any label.

    In a regression, -100 is a number like any other. `auxiliary` is the weight in the loss of `output["aux_loss"]`,
    which routers of experts add and which stays as it is.
    """
    loss = output["loss"]
    labels = labels[:, 1:] if shifted and labels.dim() > 1 else labels
    is_label = torch.ones_like(labels) if labels.is_floating_point() else labels.ne(-100)
    counted = is_label.sum().to(loss.device)
    other = auxiliary * output["aux_loss"].to(loss.device) if output.get("aux_loss") is not None else 0.0
    mean = torch.where(counted > 0, loss - other, 0.0)  # a mean over no labels is NaN
    num_items = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)  # so is 0/0
    output["loss"] = mean * (counted / num_items) + other


def contiguously(logits_to_keep: Tensor | int, inputs_embeds: Tensor | None) -> Tensor | int:
    """On a CPU, replaces a number of last positions by their indices: otherwise transformers slices the hidden states.

    The slice is not contiguous, and for its product with a frozen head torch then copies the head once for every row
    of the batch, in both directions (`should_fold` in its matmul).
    """
    if isinstance(logits_to_keep, Tensor) or inputs_embeds is None or inputs_embeds.device.type != "cpu":
        return logits_to_keep
    length = inputs_embeds.shape[1]
    return torch.arange(max(length - logits_to_keep, 0), length, device=inputs_embeds.device)


def shortened(output: Any, logits_to_keep: Tensor | int) -> Any:
    """Keeps only the logits named by `logits_to_keep`, for a model that has computed all; 0 keeps all."""
    if isinstance(logits_to_keep, Tensor):
        output["logits"] = output["logits"][:, logits_to_keep]
    elif logits_to_keep:
        output["logits"] = output["logits"][:, -logits_to_keep:]
    return output


def _counts_tokens(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Checks whether positions passed by a caller count real tokens from 0."""
    if position_ids.dim() != 2:
        return False
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if real.dim() != 2 or real.shape[1] != position_ids.shape[1]:
        return False
    return bool(((position_ids == position_ids_of(real)) | ~real.bool()).all())
