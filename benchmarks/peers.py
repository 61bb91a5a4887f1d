"""What our operators are compared with, on the same inputs: PEFT's prompt, and bitsandbytes' 4-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ept_kernels import FourBitWeight

from .timing import Call

Arguments = Sequence[tuple[Any, ...]]


def peft_embedding(arguments: Arguments) -> Call:
    """Does what `PeftModelForSeq2SeqLM.forward` does between ids and `inputs_embeds`."""
    encoders = [_peft_encoder(prompt, table) for _, _, table, prompt, *_ in arguments]

    @torch.no_grad()
    def call(i: int) -> Tensor:
        ids, _, table = arguments[i][:3]
        return _peft_forward(encoders[i], ids.shape[0], torch.nn.functional.embedding(ids, table))

    return call


def peft_embedding_backward(arguments: Arguments) -> Call:
    """Takes autograd through the same: the gradient of the prompt; the embeddings of the tokens are frozen."""
    graphs = []
    for gradient, positions, *_ in arguments:
        batch, tokens = positions.shape
        encoder = _peft_encoder(gradient[0, tokens:], gradient)
        embeds = _peft_forward(encoder, batch, torch.zeros_like(gradient[:, :tokens]))
        graphs.append((embeds, encoder.embedding.weight, gradient))
    return _gradients(graphs)


def _peft_encoder(prompt: Tensor, like: Tensor) -> Any:
    from peft import PromptEmbedding, PromptTuningConfig

    config = PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=prompt.shape[0],
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        prompt_tuning_init="RANDOM",
    )
    encoder = PromptEmbedding(config, None).to(like.device)
    with torch.no_grad():
        encoder.embedding.weight.copy_(prompt)
    return encoder


def _peft_forward(encoder: Any, batch: int, tokens: Tensor) -> Tensor:
    indices = torch.arange(encoder.embedding.num_embeddings, device=tokens.device).expand(batch, -1)
    return torch.cat((encoder(indices).to(tokens.dtype), tokens), dim=1)


def bitsandbytes_dequantize(arguments: Arguments) -> Call:
    from bitsandbytes import functional

    states = [_packed_and_state(weight, dtype) for weight, dtype in arguments]
    return lambda i: functional.dequantize_4bit(*states[i])


def bitsandbytes_matmul(arguments: Arguments) -> Call:
    """Leaves the choice between its fused kernel and dequantisation to bitsandbytes, as without gradients."""
    import bitsandbytes

    states = [(x, *_packed_and_state(weight, x.dtype)) for x, weight in arguments]
    return torch.no_grad()(lambda i: bitsandbytes.matmul_4bit(*states[i]))


def bitsandbytes_matmul_backward(arguments: Arguments) -> Call:
    """Takes autograd through `MatMul4Bit`: the gradient of the input."""
    import bitsandbytes

    graphs = []
    for gradient, weight in arguments:
        x = gradient.new_zeros(gradient.shape[0], weight.columns, requires_grad=True)
        out = bitsandbytes.matmul_4bit(x, *_packed_and_state(weight, gradient.dtype))
        graphs.append((out, x, gradient))
    return _gradients(graphs)


def _gradients(graphs: list[tuple[Tensor, Tensor, Tensor]]) -> Call:
    """Takes the gradient through a graph, given as its output, the input asked for, and the gradient of the output."""
    return lambda i: torch.autograd.grad(*graphs[i], retain_graph=True)[0]


def _packed_and_state(weight: FourBitWeight, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Returns the packed weight and its quant state as bitsandbytes takes them, over the same bytes."""
    from bitsandbytes import functional

    nested = None
    if weight.nested_code is not None:
        nested = functional.QuantState(
            absmax=weight.nested_absmax,
            code=weight.nested_code,
            blocksize=weight.nested_block_size,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size((weight.rows, weight.columns)),
        code=functional.get_4bit_type(weight.quant_type, device=weight.packed.device),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=weight.nested_offset,
        state2=nested,
    )
    return weight.packed.view(-1, 1), state
