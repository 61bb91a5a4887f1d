"""Problems of the prompt path: the prompted embedding, padded and packed, its backward, and the joint prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ept_kernels

from . import counts
from .problems import Problem, add_peer, input_sets, last_level_cache, normal, problem_of
from .shapes import PEFT, Case
from .timing import Call

SCALE, EMBEDDING_SCALE = 1.4, 0.05


def build(case: Case, device: str) -> Problem:
    """The problem of a case of the prompt path."""
    builders = {
        "prompted_embedding": _prompted_embedding,
        "prompted_embedding_packed": _prompted_embedding_packed,
        "prompted_embedding_backward": _prompted_embedding_backward,
        "joint_prompt": _joint_prompt,
    }
    return builders[case.kernel](case, device)


def _prompted_embedding(case: Case, device: str) -> Problem:
    size, dtype = case.size, getattr(torch, case.dtype)
    batch, length, width, prompt, rank = (size[k] for k in ("batch", "length", "width", "prompt", "rank"))
    distinct = _ids(batch * length, size["vocabulary"], device).unique().numel()
    counted = counts.prompted_embedding(batch, length, width, prompt, rank, length, distinct, dtype.itemsize)
    positions = torch.arange(length, device=device).expand(batch, -1).contiguous()

    table = _table(case, device)

    def inputs() -> tuple[Any, ...]:
        ids = _ids(batch * length, size["vocabulary"], device).view(batch, length)
        return ids, positions, table(), *_parameters(prompt, length, rank, width, device), SCALE

    arguments = input_sets(inputs, counted, device)
    problem = problem_of(
        case, ept_kernels.prompted_embedding, ept_kernels.prompted_embedding_reference, arguments, counted, dtype
    )
    if PEFT in case.providers:
        add_peer(problem, PEFT, lambda: _peft_embedding(arguments))
    return problem


def _prompted_embedding_packed(case: Case, device: str) -> Problem:
    size, dtype = case.size, getattr(torch, case.dtype)
    texts, longest, width, prompt, rank = (size[k] for k in ("batch", "length", "width", "prompt", "rank"))
    lengths = torch.linspace(max(1, longest // 4), longest, texts).round().long()
    tokens = int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device=device, dtype=torch.int64)
    distinct = _ids(tokens, size["vocabulary"], device).unique().numel()
    counted = counts.prompted_embedding_packed(
        texts, tokens, longest, width, prompt, rank, longest, distinct, dtype.itemsize
    )

    table = _table(case, device)

    def inputs() -> tuple[Any, ...]:
        ids = _ids(tokens, size["vocabulary"], device)
        return ids, cu_seqlens, table(), *_parameters(prompt, longest, rank, width, device), SCALE

    return problem_of(
        case,
        ept_kernels.prompted_embedding_packed,
        ept_kernels.prompted_embedding_packed_reference,
        input_sets(inputs, counted, device),
        counted,
        dtype,
    )


def _prompted_embedding_backward(case: Case, device: str) -> Problem:
    size, dtype = case.size, getattr(torch, case.dtype)
    batch, length, width, prompt, rank = (size[k] for k in ("batch", "length", "width", "prompt", "rank"))
    counted = counts.prompted_embedding_backward(batch, length, width, prompt, rank, length, dtype.itemsize)
    positions = torch.arange(length, device=device).expand(batch, -1).contiguous()

    def inputs() -> tuple[Any, ...]:
        gradient = normal(batch, prompt + length, width, device=device, dtype=dtype)
        _, A, B = _parameters(prompt, length, rank, width, device)
        return gradient, positions, A, B, SCALE

    arguments = input_sets(inputs, counted, device)
    problem = problem_of(
        case,
        ept_kernels.prompted_embedding_backward,
        ept_kernels.prompted_embedding_backward_reference,
        arguments,
        counted,
        dtype,
    )
    if PEFT in case.providers:
        add_peer(problem, PEFT, lambda: _peft_embedding_backward(arguments, prompt))
    return problem


def _joint_prompt(case: Case, device: str) -> Problem:
    size = case.size
    prompt, width, rank, positions = (size[k] for k in ("prompt", "width", "rank", "positions"))
    columns = size["spaces"] * size["space_width"]
    counted = counts.joint_prompt(prompt, positions, rank, width, columns, size["spaces"])
    options = (SCALE, EMBEDDING_SCALE, width**-0.5, "gelu")

    def inputs() -> tuple[Any, ...]:
        p, A, B = _parameters(prompt, positions, rank, width, device)
        beta = torch.full((1,), 0.5, device=device)
        no_map = torch.empty(width, 0, device=device)
        D, G = (normal(width, n, device=device) * width**-0.5 for n in (columns, size["spaces"]))
        U = normal(columns, width, device=device)
        gradient = normal(prompt, width, device=device)
        return gradient, (p, A, B, beta, no_map, no_map, D, U, G, *options)

    def both(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda gradient, parameters: (forward(*parameters), *backward(gradient, *parameters))

    return problem_of(
        case,
        both(ept_kernels.joint_prompt, ept_kernels.joint_prompt_backward),
        both(ept_kernels.joint_prompt_reference, ept_kernels.joint_prompt_backward_reference),
        input_sets(inputs, counted, device),
        counted,
        torch.float32,
    )


def _peft_embedding(arguments: Sequence[tuple[Any, ...]]) -> Call:
    """What `PeftModelForSeq2SeqLM.forward` does between ids and `inputs_embeds`."""
    encoders = [_peft_encoder(prompt, table) for _, _, table, prompt, *_ in arguments]

    def call(i: int) -> Tensor:
        ids, _, table = arguments[i][:3]
        with torch.no_grad():
            return _peft_forward(encoders[i], ids.shape[0], torch.nn.functional.embedding(ids, table))

    return call


def _peft_embedding_backward(arguments: Sequence[tuple[Any, ...]], prompt: int) -> Call:
    """Autograd through the same: gradients of the prompt; the embeddings of the tokens are frozen."""
    graphs = []
    for gradient, *_ in arguments:
        batch, rows, width = gradient.shape
        encoder = _peft_encoder(torch.zeros(prompt, width, device=gradient.device), gradient)
        embeds = _peft_forward(encoder, batch, gradient.new_zeros(batch, rows - prompt, width))
        graphs.append((embeds, encoder.embedding.weight))

    def call(i: int) -> Tensor:
        embeds, weight = graphs[i]
        return torch.autograd.grad(embeds, weight, arguments[i][0], retain_graph=True)[0]

    return call


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


def _table(case: Case, device: str) -> Callable[[], Tensor]:
    """Gives the table of a set of inputs: one for all where it is larger than the cache, since their ids differ."""
    shape, dtype = (case.size["vocabulary"], case.size["width"]), getattr(torch, case.dtype)
    if math.prod(shape) * dtype.itemsize < 2 * last_level_cache(device):
        return lambda: normal(*shape, device=device, dtype=dtype)
    shared = normal(*shape, device=device, dtype=dtype)
    return lambda: shared


def _ids(number: int, vocabulary: int, device: str) -> Tensor:
    """Random rows of the table, each at most once where there are enough."""
    if number <= vocabulary:
        return torch.randperm(vocabulary, device=device)[:number]
    return torch.randint(vocabulary, (number,), device=device)


def _parameters(prompt: int, positions: int, rank: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The short prompt, A and B, float32."""
    return (
        normal(prompt, width, device=device),
        normal(positions, rank, device=device) * 0.1,
        normal(rank, width, device=device) * 0.1,
    )
