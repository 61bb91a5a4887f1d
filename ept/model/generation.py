"""Generating with an adapter: what the base model's `generate` is called with, and what becomes of its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .inputs import cache_name, call_inputs, length_of
from .prompt_cache import cached_prompt, check_cacheable

if TYPE_CHECKING:
    from .ept_model import EPTModel


def generate(model: EPTModel, input_ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Generates as `EPTModel.generate` says."""
    if not hasattr(model.base_model, "generate"):
        raise ValueError(f"{type(model.base_model).__name__} cannot generate")
    use_prompt_cache = kwargs.pop("use_prompt_cache", False)
    if model._adapters_disabled:
        return model.base_model.generate(input_ids, *args, **kwargs)
    kwargs.pop("labels", None)
    ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
    names = ("attention_mask", "inputs_embeds", "text_mask", "adapter_names")
    mask, embeds, text_mask, adapter_names = (kwargs.pop(name, None) for name in names)
    if "generation_config" in model.__dict__:  # set on the wrapper by a user
        kwargs.setdefault("generation_config", model.__dict__["generation_config"])
    if use_prompt_cache:
        if adapter_names is not None:
            raise ValueError("a prompt cache holds one adapter's prompt: leave out adapter_names or use_prompt_cache")
        padded = mask is not None and not bool(mask[:, 0].all())
        check_cacheable(model.base_model, model._facts, kwargs, padded)
    # A cached prompt stays first, with padding behind it.
    inputs = call_inputs(model, ids, mask, embeds, text_mask, adapter_names, kwargs, generating=not use_prompt_cache)
    if model.active_peft_config.task_type != "CAUSAL_LM":
        return model.base_model.generate(*args, **inputs)
    if use_prompt_cache:
        s, name = model._layer().config.num_virtual_tokens, model.active_adapter
        inputs[cache_name(model._facts)] = cached_prompt(model._prompt_caches, name, model.base_model, inputs, s)
    # generate() counts positions from the mask itself, at every step.
    inputs.pop("position_ids", None)
    _count_new_tokens(inputs, length_of(ids, embeds), model.base_model.generation_config)
    output = model.base_model.generate(*args, **inputs)
    if ids is None:
        return output
    generated = output if isinstance(output, Tensor) else output.sequences
    continued = ids.to(generated.device).repeat_interleave(len(generated) // len(ids), dim=0)
    sequences = torch.cat([continued, generated], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _count_new_tokens(inputs: dict[str, Any], n: int, default: Any) -> None:
    """Turns bounds on the whole length into bounds on new tokens: the base model would count the prompt too."""
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
