"""Models of well-known shapes with random weights: the cost of a step, without a download.

A step's time depends on a model's shape and not on the values of its weights. Nothing here says anything about scores.
"""

from __future__ import annotations

from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn

from ..model.base_model import freeze

SEED = 0
_STD = 0.02  # of a 4-bit model's random weights, as most decoders are initialised

_T5 = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
# Values of `_T5` and `_LLAMA`, from the models' published configurations.
SHAPES: dict[str, tuple[int, ...]] = {
    "t5-small": (512, 64, 2048, 6, 8),
    "t5-base": (768, 64, 3072, 12, 12),
    "t5-large": (1024, 64, 4096, 24, 16),
    "t5-3b": (1024, 128, 16384, 24, 32),
    "t5-11b": (1024, 128, 65536, 24, 128),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, False),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False),
}


def build_shape(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    layers: int | None = None,
) -> Any:
    """Builds a frozen model of the shape `name` with random weights, in eval mode on `device`.

    Args:
        name: one of `SHAPES`.
        dtype: of the weights, or of the products if they are quantised.
        quantization: `"nf4"` or `"fp4"`: linear layers become bitsandbytes' 4-bit layers with nested absmax, as
            transformers loads them (not the output head, nor parts that the model keeps in higher precision).
        attn_implementation: None: transformers' choice.
        layers: number to keep, from the first, in encoder and decoder each; None: all.

    Raises:
        ValueError: there is no such shape, it has fewer layers, or its weights do not fit into the device's free
            memory.
    """
    import transformers

    config = shape_config(name, layers)
    model_class = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        skeleton = model_class.from_config(config, dtype=dtype, **options)
    # The layers that transformers would load in 4 bits.
    kept = set(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    head = skeleton.get_output_embeddings()
    linears = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] not in kept
    }
    quantized = sum(linear.weight.numel() for linear in linears.values()) if quantization else 0
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    needed = (total - quantized) * dtype.itemsize + quantized * 9 // 16  # 4 bits and 1/64 of an absmax in 8 bits
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"the weights of {name} take {needed / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free: "
            "choose bfloat16 or nf4, fewer layers, or a smaller shape"
        )
    torch.manual_seed(SEED)
    if quantization is None:
        with device:
            model = model_class.from_config(config, dtype=dtype, **options)
    else:
        with init_empty_weights(include_buffers=False):  # the rotary frequencies are computed, not loaded
            model = model_class.from_config(config, dtype=dtype, **options)
        _fill_quantized(model, linears, dtype, quantization, device)
    model.eval()
    freeze(model)
    return model


def shape_config(name: str, layers: int | None = None) -> Any:
    """Returns transformers' configuration of the shape `name`. Raises ValueError as `build_shape`."""
    from transformers import LlamaConfig, T5Config

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: choose one of {', '.join(SHAPES)}")
    config: Any
    if name.startswith("t5"):
        config = T5Config(vocab_size=32128, decoder_start_token_id=0, **dict(zip(_T5, SHAPES[name])))
    else:
        config = LlamaConfig(max_position_embeddings=8192, **dict(zip(_LLAMA, SHAPES[name])))
    if layers is not None:
        whole = config.num_hidden_layers
        if not 1 <= layers <= whole:
            raise ValueError(f"layers={layers} is out of range: {name} has {whole} layers")
        config.num_hidden_layers = layers
        if config.is_encoder_decoder:
            config.num_decoder_layers = layers
    return config


def _fill_quantized(
    model: Any, linears: dict[str, nn.Linear], dtype: torch.dtype, quant_type: str, device: torch.device
) -> None:
    """Fills the empty weights at random, one layer at a time, so that no whole float model is ever held."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in linears.items():
        weight = torch.randn(linear.weight.shape, dtype=dtype, device=device) * _STD
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            dtype,
            quant_type=quant_type,
            device="meta",
        )
        params = Params4bit(weight, requires_grad=False, quant_type=quant_type, compress_statistics=True, module=layer)
        layer.weight = params.to(device)
        model.set_submodule(name, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.full(parameter.shape, float(name != "bias"), dtype=dtype, device=device)
                if parameter.dim() > 1:
                    value.normal_(0.0, _STD)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.to(device)
    model.tie_weights()
