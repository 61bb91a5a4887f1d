"""The prompt's keys and values in a decoder-only model: computed once for all rows of a batch, or for every `generate`.

A decoder's prompt does not see the text after it, so its keys and values are the same for every text. `generate`
caches them per adapter as long as the prompt's embeddings and the base model's weights stay the same; after training,
loading or moving either, they are recomputed. A training step computes them once, with their gradients.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .facts import BaseModelFacts
from .inputs import BaseInputs, cache_name, cached_length
from .layout import numbered

if TYPE_CHECKING:
    from .ept_model import EPTModel
    from .generation import GenerationOptions


@dataclass
class PromptCache:
    """Keys and values that a model computed for a prompt."""

    prompt: Tensor  # embeddings of the prompt, [s, d]
    weights: tuple[Any, ...]  # state of the model's weights at that time
    cache: DynamicCache  # of one row, s positions in every layer

    @classmethod
    def compute(cls, model: Any, prompt: Tensor, weights: tuple[Any, ...], offset: int) -> PromptCache:
        """Runs `model` on the prompt `[s, d]` alone, at positions from `offset`.

        Raises `ValueError` if the model's cache holds anything other than keys and values.
        """
        ones = torch.ones(1, len(prompt), dtype=torch.int64, device=prompt.device)
        backbone = model.get_decoder() if hasattr(model, "get_decoder") else model
        positions = {}
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            positions["position_ids"] = numbered(ones, offset)
        with torch.no_grad():
            output = backbone(inputs_embeds=prompt[None], attention_mask=ones, use_cache=True, **positions)
        try:
            return cls(prompt.clone(), weights, _keys_and_values(output))
        except TypeError as error:
            raise ValueError(
                f"{type(model).__name__} keeps {error}, not keys and values of every position: call generate without "
                "use_prompt_cache"
            ) from None


def _keys_and_values(output: Any) -> DynamicCache:
    """Returns the cache in a model's output; raises `TypeError`, naming the content, for any other kind of cache."""
    cache = output.get("cache", output.get("past_key_values"))  # since transformers 5.24, and before
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    if type(cache) is not DynamicCache or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise TypeError(", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__)
    return cache


def read_prompt_once(model: Any, facts: BaseModelFacts, inputs: BaseInputs, with_logits: bool = False) -> None:
    """Replaces the prompt's rows in `inputs` by the keys and values that `model` computes for it once, for all texts.

    Gradients flow as if every text had been read after its own prompt. The first `inputs.s` rows must be the same for
    all texts, with no padding before them. If requested, their logits `[1, s, vocabulary]` go to `prompt_logits`.
    """
    embeds, s = inputs["inputs_embeds"], inputs.s
    alone: dict[str, Any] = {"inputs_embeds": embeds[:1, :s], "use_cache": True, "return_dict": True}
    if "attention_mask" in inputs:
        alone["attention_mask"] = inputs["attention_mask"][:1, :s]
    if "position_ids" in inputs:
        alone["position_ids"] = inputs["position_ids"][:1, :s]
        inputs["position_ids"] = inputs["position_ids"][:, s:]
    output = model(**alone, logits_to_keep=0 if with_logits else 1)
    inputs.prompt_logits = output["logits"] if with_logits else None
    cache = _keys_and_values(output)
    for layer in cache.layers:
        layer.keys, layer.values = (x.expand(len(embeds), *x.shape[1:]) for x in (layer.keys, layer.values))
    inputs.update({"inputs_embeds": embeds[:, s:], cache_name(facts): cache, "use_cache": False})


def cached_prompt(
    caches: dict[str, PromptCache],
    name: str,
    model: Any,
    embeds: Tensor,
    s: int,
    offset: int,
    options: GenerationOptions,
) -> DynamicCache | None:
    """Returns the cache of the first `s` rows of `embeds`, the prompt, for all rows of `generate`; None if s = 0.

    It is kept in `caches` for the adapter `name`, and recomputed if it does not fit. `offset` is the position of the
    model's first token, `options` are those of the call.
    """
    if not s:
        return None
    prompt, kept = embeds[0, :s], caches.get(name)
    weights = _state_of(model)
    if (
        kept is None
        or kept.weights != weights
        or (kept.prompt.dtype, kept.prompt.device) != (prompt.dtype, prompt.device)
        or not torch.equal(kept.prompt, prompt)
    ):
        kept = caches[name] = PromptCache.compute(model, prompt, weights, offset)
    # `generate` makes several rows per text: beams, or sequences to return.
    copies = (options[key] or 1 for key in ("num_beams", "num_return_sequences"))
    cache = copy.deepcopy(kept.cache)  # `generate` extends it
    cache.batch_repeat_interleave(len(embeds) * max(copies))
    return cache


def _state_of(model: nn.Module) -> tuple[Any, ...]:
    """Returns a fingerprint of a model's weights: address and version of each, and LoRA's active adapters.

    Values written through `.data` go unnoticed.
    """
    weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    tuned = [
        (*module.active_adapters, module.disable_adapters, *module.merged_adapters, str(getattr(module, "scaling", "")))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return (*weights, *tuned)


def check_shareable(model: Any, facts: BaseModelFacts) -> None:
    """Raises `ValueError` if a prompt read once for a batch differs from one read for each text."""
    name = type(model).__name__
    if facts.task_type != "CAUSAL_LM":
        raise ValueError(
            f"the prompt of {name} changes with the text after it and cannot be read once for a batch: share_prompt "
            "is for decoder-only models"
        )
    if "logits_to_keep" not in facts.forward_arguments:
        raise ValueError(f"{name} takes no logits_to_keep, but a prompt that is read once for a batch has no logits")
    if kinds := _angles_by_length(model.config.get_text_config()):
        raise ValueError(
            f"{name} turns positions by an angle that depends on the length of the whole text ({kinds.pop()} RoPE), "
            "so its prompt cannot be read once for a batch"
        )


def is_shareable(
    model: EPTModel, attention_mask: Tensor | None, logits_to_keep: Tensor | int, given: dict[str, Any]
) -> bool:
    """Checks whether a call of `model` needs only results for the prompt that are the same in every row.

    `given` are its arguments for the frozen model.
    """
    base, config = model.base_model, model.active_peft_config
    outputs = ("output_attentions", "output_hidden_states", "output_router_logits")
    others = {name for name, value in given.items() if value is not None and value is not False}
    return not (
        torch.compiler.is_compiling()
        or isinstance(logits_to_keep, Tensor)
        or (attention_mask is not None and not model._facts.splits_prompt)
        or others - {"return_dict", "position_ids"}  # their entries for the prompt are unknown
        or any(getattr(base.config, name, False) for name in outputs)
        or (model.training and config.base_dropout)  # which differs between rows
        # Layers under gradient checkpointing drop the cache.
        or any(module.training and getattr(module, "gradient_checkpointing", False) for module in base.modules())
    )


def _angles_by_length(config: Any) -> set[str]:
    """Returns the kinds of rotary embedding in a configuration whose angles depend on the length of the whole text."""
    rope = getattr(config, "rope_parameters", None) or {}  # for all layers, or for each kind of layer
    types = {str(e["rope_type"]) for e in (rope, *rope.values()) if isinstance(e, dict) and "rope_type" in e}
    return types & {"dynamic", "longrope"}


def check_cacheable(model: Any, facts: BaseModelFacts, options: GenerationOptions, padded: bool) -> None:
    """Raises `ValueError` if `generate` after a cached prompt would differ from `generate` without the cache.

    `padded`: there would be padding between the prompt and the text.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if facts.task_type == "SEQ_2_SEQ_LM":
        raise ValueError(
            f"the prompt of {name} is part of the encoder's input and changes with it: use_prompt_cache is for "
            "decoder-only models"
        )
    if kinds := _angles_by_length(config):
        raise ValueError(
            f"{name} turns positions by an angle that depends on the length of the whole text ({kinds.pop()} RoPE): "
            "call generate without use_prompt_cache"
        )
    if (kind := options["cache_implementation"]) is not None:
        raise ValueError(
            f"cache_implementation={kind!r} makes a cache without the prompt: set it to None in the call's or the "
            "model's generation_config, or call generate without use_prompt_cache"
        )
    if options.asked_for("use_cache") is False:
        raise ValueError("use_cache=False and use_prompt_cache=True exclude each other: leave one out")
    if cached_length(facts, options.given):
        raise ValueError("past_key_values and use_prompt_cache=True exclude each other: leave one out")
    if padded and not facts.splits_prompt:
        raise ValueError(
            f"{name} counts positions by index or sees a window of them, so the cached prompt cannot move to after "
            "the padding of shorter rows: give rows of one length, or call generate without use_prompt_cache"
        )
