"""Facts about a frozen base model that the adapter needs, and the checks that refuse what cannot work."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


@dataclass(frozen=True)
class BaseModelFacts:
    """Facts that decide how a base model is called."""

    forward: Any  # the function that answered when these facts were found
    forward_arguments: frozenset[str]  # names that it accepts
    position_offset: int  # added to position ids (RoBERTa counts from `padding_idx + 1`)
    position_limit: int | None  # the most positions it can number
    # No padding may stand between prompt and text: the model counts positions by index, or sees a window of them.
    prompt_beside_text: bool
    classifies: bool  # as a sequence classifier
    pools_last: bool  # as a classifier that reads the last row


def infer_task_type(model: Any) -> str:
    """Returns SEQ_2_SEQ_LM, CAUSAL_LM or SEQ_CLS for a model, or for the configuration of one not loaded yet.

    A configuration without a language-model head is taken for a classifier's, since a head can be added. A model that
    is none of these raises `ValueError`.
    """
    name = type(model).__name__
    if "ForSequenceClassification" in name:
        return "SEQ_CLS"
    if getattr(getattr(model, "config", model), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    if not isinstance(model, nn.Module):
        heads = getattr(model, "architectures", None) or []
        return "CAUSAL_LM" if any("CausalLM" in head or "LMHead" in head for head in heads) else "SEQ_CLS"
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        return "CAUSAL_LM"
    raise ValueError(f"cannot tell the task of {name}: set task_type to SEQ_2_SEQ_LM, CAUSAL_LM or SEQ_CLS")


def input_embedding(model: Any) -> nn.Module:
    """Returns the module that embeds the input text: an encoder may have its own (T5's, BART's scaled one)."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder().get_input_embeddings()
    return model.get_input_embeddings()


def examine(model: Any, task_type: str) -> BaseModelFacts:
    """Collects the facts about `model`; a `ValueError` says why it cannot be adapted and what would do."""
    name = type(model).__name__
    forward, arguments = _forward_of(model)
    if "inputs_embeds" not in arguments:
        raise ValueError(f"{name} takes no inputs_embeds, so that no prompt can be put before its input")
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if getattr(text_config, "hidden_size_per_layer_input", None) or any(
        part.endswith("embed_tokens_per_layer") for part, _ in model.named_modules()
    ):
        raise ValueError(
            f"{name} looks up a second embedding of every token for each layer and so needs input_ids beside "
            "embeddings; prompt rows have no ids: use a model without per-layer embeddings"
        )
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if encoder_decoder != (task_type == "SEQ_2_SEQ_LM"):
        kind, suggestion = "an encoder-decoder" if encoder_decoder else "not an encoder-decoder", "another model"
        with contextlib.suppress(ValueError):
            suggestion = infer_task_type(model)
        raise ValueError(f"task_type={task_type} does not fit {name}, which is {kind}: use {suggestion}")
    offset, limit = 0, None
    for part, module in model.named_modules():
        if part.rpartition(".")[2] in _POSITION_TABLES and isinstance(module, nn.Embedding):
            inside = getattr(module, "offset", 0)  # added by the module itself (OPT, BART)
            offset = 0 if module.padding_idx is None or inside else module.padding_idx + 1
            limit = module.num_embeddings - inside - offset
            break
    layer_types = getattr(text_config, "layer_types", None) or []
    windowed = any(kind != "full_attention" for kind in layer_types) or (
        not layer_types and getattr(text_config, "sliding_window", None) is not None
    )
    by_index = not encoder_decoder and task_type == "CAUSAL_LM" and "position_ids" not in arguments
    return BaseModelFacts(
        forward=forward,
        forward_arguments=arguments,
        position_offset=offset,
        position_limit=limit,
        prompt_beside_text=by_index or encoder_decoder or windowed,
        classifies=task_type == "SEQ_CLS",
        pools_last=task_type == "SEQ_CLS" and hasattr(model, "score"),
    )


def with_forward_of(facts: BaseModelFacts, model: Any) -> BaseModelFacts:
    """Returns `facts` with the arguments of the `forward` that `model` has now: trainers put their own in its place."""
    if getattr(model.forward, "__func__", model.forward) is facts.forward:
        return facts
    forward, arguments = _forward_of(model)
    return replace(facts, forward=forward, forward_arguments=arguments)


def _forward_of(model: Any) -> tuple[Any, frozenset[str]]:
    return getattr(model.forward, "__func__", model.forward), frozenset(inspect.signature(model.forward).parameters)


def trained_heads(model: Any) -> list[str]:
    """Names a classifier's top-level modules outside its backbone: freshly initialised, to be trained and saved."""
    backbone = getattr(model, "base_model_prefix", "")
    heads = [name for name, child in model.named_children() if name != backbone and [*child.parameters()]]
    if not heads:
        raise ValueError(f"found no classification head in {type(model).__name__}: name it in modules_to_save")
    return heads


def wrapped_heads(model: nn.Module) -> Iterator[Any]:
    """Yields PEFT's wrappers of trained modules in `model`: each holds the original and one copy an adapter."""
    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


def head_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Lists name and shape of every tensor that an adapter with `modules_to_save=names` keeps of `model`.

    PEFT trains a copy of each module whose name ends in one of `names`; what it would copy is known here without
    copying it. A `ValueError` says so where a module and a part of it are both named.
    """
    modules: dict[str, nn.Module] = {}
    for key, module in model.named_modules(remove_duplicate=False):
        inside = next((outer for outer in modules if key.startswith(f"{outer}.")), None)
        if inside is not None and isinstance(modules[inside], AuxiliaryTrainingWrapper):
            continue  # the copies that a loaded adapter has of its head
        if key and any(key.endswith(name) for name in names):
            if inside is not None:
                raise ValueError(
                    f"modules_to_save names {key} and also {inside}, which holds it: name one of them in full"
                )
            modules[key] = module
    return {
        f"base_model.{key}.{name}": tuple(tensor.shape)
        for key, module in modules.items()
        for name, tensor in getattr(module, "original_module", module).state_dict().items()
    }


def freeze(model: nn.Module) -> None:
    """Turns off the gradients of all parameters; 4-bit weights go back to the layout that gradients pass through.

    bitsandbytes repacks 4-bit weights on some CPUs at the first inference.
    """
    model.requires_grad_(False)
    repacked = False
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes unpacks in place when it saves
            if state.absmax.dim() == 2:  # it leaves plain scales [blocks of a row, rows] and in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float()
            repacked = True
    if repacked:
        warnings.warn(
            "the base model's 4-bit weights had been repacked for CPU inference with their scales rounded to "
            "bfloat16; load it afresh for exact results",
            stacklevel=2,
        )


def swap_4bit(model: nn.Module, fast_4bit: bool, dequantized_cache_bytes: int) -> None:
    """Swaps bitsandbytes' 4-bit layers for ours, unless `fast_4bit` is off or the model was swapped by hand."""
    if dequantized_cache_bytes and not fast_4bit:
        raise ValueError(
            f"dequantized_cache_bytes={dequantized_cache_bytes} is for the layers of fast_4bit=True: leave one out"
        )
    if fast_4bit and "bitsandbytes" in sys.modules:  # otherwise no layer is of it
        from .linear4bit import Linear4bit, swap_linear4bit

        # A model that was swapped by hand keeps its options.
        if dequantized_cache_bytes or not any(isinstance(module, Linear4bit) for module in model.modules()):
            swap_linear4bit(model, dequantized_cache_bytes=dequantized_cache_bytes)


def set_mode(model: nn.Module, training: bool, dropout: bool) -> None:
    """Puts the frozen model in the mode that training an adapter wants.

    Without `dropout` it stays in `eval` mode while training. Two kinds of module need the training flag all the
    same: layers under gradient checkpointing, which would silently keep all activations, and bitsandbytes' 4-bit
    layers on a CPU, which would repack their weights beyond differentiation.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(training and dropout)
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4"):
            module.training = True
        elif training and isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            rate = getattr(module, "dropout", 0.0)
            if isinstance(rate, float) and rate > 0 and not dropout:
                warnings.warn(
                    f"gradient checkpointing needs {type(module).__name__} in training mode, which turns on its own "
                    f"dropout of {rate}: set the model's dropout to 0 for none",
                    stacklevel=2,
                )


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Turns gradient checkpointing off as long as the context lasts: in training mode its layers drop the cache."""
    layers: Any = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
