"""Weights and tiny models quantised by bitsandbytes, and bitsandbytes' own answer for weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from tiny_models import FAMILIES, make_model
from torch import Tensor

# Widths that bitsandbytes' blocks of 64 divide.
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128}}


def write_checkpoints(tmp_path_factory: Any) -> dict[str, Any]:
    """Folders of the tiny models of `SIZES`, by name."""
    folders = {}
    for name, sizes in SIZES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make_model(name, **sizes).save_pretrained(folders[name])
    return folders


def load_4bit(
    name: str,
    folder: Any,
    kind: str = "nf4",
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    device_map: str = "cpu",
    **options: Any,
) -> Any:
    """The tiny model of `folder` on the CPU, its layers in 4 bits; `options` of `BitsAndBytesConfig`."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
    model_class = getattr(transformers, FAMILIES[name][1])
    return model_class.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device_map)


def quantize(
    rows: int,
    columns: int,
    quant_type: str = "nf4",
    nested: bool = True,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Params4bit:
    """A random `[rows, columns]` weight in 4 bits, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    return Params4bit(
        packed,
        quant_state=state,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


def dequantize(weight: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' dequantised weight `[rows, columns]`.

    It is asked for one long row: its own CPU code mistakes the blocks that straddle rows, though it writes them.
    """
    state = weight.quant_state
    rows, columns = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = functional.QuantState(
        absmax, torch.Size((1, rows * columns)), state.code, state.blocksize, state.quant_type, dtype
    )
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its plain version
        return functional.dequantize_4bit(weight.data, flat).reshape(rows, columns)
