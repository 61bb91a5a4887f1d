"""The frozen base model: its embedding and heads, how it is frozen, its modes and its 4-bit layers."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..utils.messages import listed

_HALF = (torch.bfloat16, torch.float16)


def input_embedding(model: Any) -> nn.Module:
    """Returns the module that embeds the input text; an encoder may have its own (T5's, BART's scaled one)."""
    if getattr(model.config, "is_encoder_decoder", False):
        with contextlib.suppress(AttributeError, NotImplementedError):  # some encoders leave it to the whole model
            return model.get_encoder().get_input_embeddings()
    return model.get_input_embeddings()


def trained_heads(model: Any) -> list[str]:
    """Names the freshly initialised modules of a model, which are to be trained and saved.

    These are top-level modules outside its backbone, and others that its checkpoint lacks, such as a pooler inside it.
    """
    if not (heads := _outside_backbone(model)):
        raise ValueError(f"found no classification head in {type(model).__name__}: name it in modules_to_save")
    absent = [name for name in absent_modules(model) if "." in name]  # others are heads or own parameters
    return [*heads, *(name for name in absent if name.partition(".")[0] not in heads)]


def absent_modules(model: nn.Module) -> list[str]:
    """Names the modules for which a checkpoint had no weights, so that transformers draws them anew at each load.

    Empty for a model that was not read from a checkpoint: transformers marks the parameters that it has read, and the
    modules that it has initialised. Weights that a class lists as never stored, such as Marian's sines, are the same at
    each load. Quantised weights, and those kept on disk, are no longer the parameters that were marked.
    """

    def is_marked(thing: Any) -> bool:
        return getattr(thing, "_is_hf_initialized", False)

    def is_drawn(key: str, parameter: nn.Parameter) -> bool:
        is_replaced = parameter.is_meta or type(parameter) is not nn.Parameter
        return not (is_marked(parameter) or is_replaced or any(re.search(pattern, key) for pattern in never_stored))

    if not any(map(is_marked, model.parameters())):
        return []
    copies = {module for wrapper in wrapped_heads(model) for module in wrapper.modules_to_save.modules()}
    never_stored = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    names = []
    for name, module in model.named_modules():
        drawn = [key for key, parameter in module.named_parameters(name, recurse=False) if is_drawn(key, parameter)]
        if drawn and is_marked(module) and module not in copies:
            names.append(name.replace(".original_module", "") or listed(drawn))
    return names


def _outside_backbone(model: Any) -> list[str]:
    backbone = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != backbone and [*child.parameters()]]


def wrapped_heads(model: nn.Module) -> Iterator[Any]:
    """Yields PEFT's wrappers of trained modules in `model`; each holds the original and one copy per adapter."""
    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


def train_in_float32(model: nn.Module, adapter_name: str) -> None:
    """Keeps the modules of a 16-bit `model` that `adapter_name` trains in float32, like its prompt.

    In bfloat16 a step smaller than 2⁻⁹ of the weight is lost, and so are small changes of Adam's averages. Heads then
    return float32; modules whose result is used inside the model keep their dtype.
    """
    wrapped = {key: module for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    ends_in_heads = all(name in wrapped for name in _outside_backbone(model))
    for key, wrapper in wrapped.items():
        if adapter_name not in wrapper.modules_to_save:  # it belongs to another adapter
            continue
        module = wrapper.modules_to_save[adapter_name]
        narrow = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in _HALF]
        if narrow:
            module.register_forward_pre_hook(_convert_inputs, with_kwargs=True)
            if "." in key or not ends_in_heads:
                module.register_forward_hook(partial(_convert_result, wrapper.original_module))
        for tensor in narrow:
            tensor.data = tensor.data.float()


def narrowed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Casts the arguments of a 16-bit `module` to its dtype; leaves those of other modules alone."""
    return _convert_inputs(module, args, kwargs) if _dtype_of(module) in _HALF else (args, kwargs)


def _convert_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    dtype = _dtype_of(module)
    return tuple(_converted(x, dtype) for x in args), {name: _converted(x, dtype) for name, x in kwargs.items()}


def _convert_result(original: nn.Module, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    dtype = _dtype_of(original)
    return tuple(_converted(x, dtype) for x in result) if isinstance(result, tuple) else _converted(result, dtype)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(t.dtype for t in chain(module.parameters(), module.buffers()) if t.is_floating_point())


def _converted(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def name_labels(model: Any, words: Sequence[str] | None) -> None:
    """Sets the names of a classifier's labels, as shown by pipelines, if their number fits."""
    config = model.config
    if words and len(words) == len(label_names(model)):
        config.id2label, config.label2id = dict(enumerate(words)), {word: i for i, word in enumerate(words)}


def label_names(model: Any) -> list[str]:
    """Lists the names of a model's labels in the order of its outputs; empty if it has none."""
    names = getattr(model.config, "id2label", None) or {}
    return [names[number] for number in sorted(names)]


def head_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Lists name and shape of every tensor of `model` that an adapter with `modules_to_save=names` stores.

    PEFT trains a copy of each module whose name ends in one of `names`; this finds the copies without making them.
    Raises `ValueError` if a module and a part of it are both named.
    """
    modules: dict[str, nn.Module] = {}
    for key, module in model.named_modules(remove_duplicate=False):
        inside = next((outer for outer in modules if key.startswith(f"{outer}.")), None)
        if inside is not None and isinstance(modules[inside], AuxiliaryTrainingWrapper):
            continue  # a loaded adapter's copies of its head
        if key and any(key.endswith(name) for name in names):
            if inside is not None:
                raise ValueError(
                    f"modules_to_save names {key} and also {inside}, which contains it: give the full name of one of "
                    "them"
                )
            modules[key] = module
    return {
        f"base_model.{key}.{name}": tuple(tensor.shape)
        for key, module in modules.items()
        for name, tensor in getattr(module, "original_module", module).state_dict().items()
    }


def lost_modules(model: Any, trained: Iterable[str] | None) -> list[str]:
    """Names the modules that the checkpoint of `model` lacks and that are not among those named in `trained`."""
    ends = tuple(trained or ())
    return [
        name
        for name in absent_modules(model)
        if not any(part.endswith(ends) for part in accumulate(name.split("."), "{}.{}".format))
    ]


def check_heads(model: Any, trained: Iterable[str] | None) -> None:
    """Refuses to train quantised weights and modules that are never called; warns of a language model's quantised head.

    `llm_int8_skip_modules` names the modules that bitsandbytes leaves unquantised; if set, heads are no longer left
    alone by default. An encoder-decoder's `shared` holds a weight that its encoder and decoder use through their own
    modules.
    """
    holder = model.get_input_embeddings() if getattr(model.config, "is_encoder_decoder", False) else None
    if holder is input_embedding(model):
        holder = None
    for key, module in model.named_modules():
        if trained and module is holder and key.endswith(tuple(trained)):
            raise ValueError(
                f"{key} of {type(model).__name__} is never called, so its copy would not be trained: name the "
                "encoder's or the decoder's embeddings in modules_to_save (embed_tokens names both)"
            )
        name = key.rpartition(".")[2]
        remedy = f"load the model with BitsAndBytesConfig(..., llm_int8_skip_modules=[..., {name!r}])"
        parameters: Any = module.parameters()
        quantised = any(hasattr(p, "quant_state") or not p.is_floating_point() for p in parameters)
        if quantised and key and trained and key.endswith(tuple(trained)):
            raise ValueError(f"{key} of {type(model).__name__} is quantised and cannot be trained: {remedy}")
        get_head = getattr(model, "get_output_embeddings", None)
        if quantised and get_head is not None and module is get_head():
            warnings.warn(
                f"the head {key} of {type(model).__name__} is quantised: answers get worse, and trainers that use "
                f"its weight directly, such as TRL's, fail: {remedy}",
                stacklevel=2,
            )


def freeze(model: nn.Module) -> None:
    """Turns off the gradients of all parameters, and restores the layout of 4-bit weights that gradients need.

    bitsandbytes repacks 4-bit weights on some CPUs at the first inference.
    """
    model.requires_grad_(False)
    repacked = False
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes unpacks in place when it saves
            if state.absmax.dim() == 2:  # it leaves plain scales as [blocks of a row, rows] and in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float()
            repacked = True
    if repacked:
        warnings.warn(
            "the base model's 4-bit weights had been repacked for CPU inference with their scales rounded to "
            "bfloat16; load it afresh for exact results",
            stacklevel=2,
        )


def swap_4bit(model: nn.Module, fast_4bit: bool, dequantized_cache_bytes: int) -> None:
    """Replaces bitsandbytes' 4-bit layers by ours, unless `fast_4bit` is off or the model was swapped by hand."""
    if dequantized_cache_bytes and not fast_4bit:
        raise ValueError(
            f"dequantized_cache_bytes={dequantized_cache_bytes} is only for fast_4bit=True: set that, or leave it out"
        )
    if fast_4bit and "bitsandbytes" in sys.modules:  # otherwise there are no such layers
        from .linear4bit import Linear4bit, swap_linear4bit

        # A model that was swapped by hand keeps its options.
        if dequantized_cache_bytes or not any(isinstance(module, Linear4bit) for module in model.modules()):
            swap_linear4bit(model, dequantized_cache_bytes=dequantized_cache_bytes)


def set_mode(model: nn.Module, training: bool, dropout: bool) -> None:
    """Sets the frozen model's mode for training an adapter.

    Without `dropout` it stays in `eval` mode during training. Three kinds of module need the training flag anyway:
    layers under gradient checkpointing, which would silently keep all activations; bitsandbytes' 4-bit layers on a
    CPU, which would repack their weights into a form that cannot be differentiated; and embeddings with NEFTune's
    noise, which is off in `eval` mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    everywhere = training and dropout
    if model.training != everywhere:
        model.train(everywhere)
    # Trainers call this before every step; setting only the flags that differ takes a third of the time of `train()`.
    for module in model.modules():
        wanted = everywhere
        if type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4") or (
            training and isinstance(module, nn.Embedding) and module._forward_hooks
        ):
            wanted = True
        elif training and isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            wanted = True
            rate = getattr(module, "dropout", 0.0)
            if isinstance(rate, float) and rate > 0 and not dropout:
                warnings.warn(
                    f"gradient checkpointing needs {type(module).__name__} in training mode, which turns on its own "
                    f"dropout of {rate}: set the model's dropout to 0 for none",
                    stacklevel=2,
                )
        if module.training != wanted:
            module.training = wanted


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Turns gradient checkpointing off within the context: in training mode it makes layers drop the cache."""
    layers: Any = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
