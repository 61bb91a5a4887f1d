"""Prepared cases: several sets of inputs, the minimum work, and a call for each version, both ours and those of the
libraries with which we are compared: PEFT's prompt, and bitsandbytes' 4-bit weights.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ept_kernels
from ept_kernels import FourBitWeight
from ept_kernels.dev.problems import FourBit, JointPrompt, PackedEmbedding, PromptedEmbedding, TokenUpdate

from . import counts
from .frozen import frozen_work
from .shapes import (
    BITSANDBYTES,
    BY_TOKEN,
    COMPILED,
    COPY,
    DENSE,
    EAGER,
    FROZEN,
    LIGER,
    MODEL,
    OURS,
    OURS_AGAIN,
    PEFT,
    Case,
)
from .timing import Call

MAX_BYTES = 8 << 30  # of all input sets of a case
MAX_SETS = 256
CPU_CACHE = 32 << 20  # assumed: PyTorch does not tell the size of a CPU's last-level cache

# Maximum ‖out − reference‖ / ‖reference‖ of a version; with a larger error its time does not count.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Arguments = Sequence[tuple[Any, ...]]


@dataclass
class Prepared:
    """Calls by version, each of which takes the number of an input set.

    Attributes:
        calls: versions that can run.
        skipped: version → why it cannot.
        sets: number of input sets.
        counted: minimum bytes and operations of one call.
        reference: computes the expected result of every version on set 0.
        tolerance: relative error that a version may have.
        must_equal: version that ours has to equal bit for bit.
    """

    calls: dict[str, Call]
    sets: int
    counted: counts.Counts
    reference: Callable[[], Any]
    tolerance: float
    skipped: dict[str, str] = field(default_factory=dict)
    must_equal: str = ""


def prepare(case: Case, device: str, compile_allowed: bool = True) -> Prepared:
    """Prepares `case` on `device`; every version is skipped if the operator does not exist."""
    if not hasattr(ept_kernels, case.kernel):
        reason = f"this version of ept_kernels has no {case.kernel}"
        return Prepared({}, 1, counts.Counts(0, 0), tuple, 0.0, dict.fromkeys(case.providers, reason))
    if case.kernel in FROZEN:
        prepared = _frozen(case, device)
    elif case.kernel in BY_TOKEN:
        prepared = _by_token(case, device)
    elif "4bit" in case.kernel:
        prepared = _four_bit(case, device)
    else:
        prepared = (_joint_prompt if case.kernel == "joint_prompt" else _embedding)(case, device)
    if COPY in case.providers:
        prepared.calls[COPY] = _copy(prepared.counted.bytes, prepared.sets, device)
    if not compile_allowed and COMPILED in prepared.calls:
        del prepared.calls[COMPILED]
        prepared.skipped[COMPILED] = "not compiled in a reduced run"
    return prepared


def _embedding(case: Case, device: str) -> Prepared:
    """Prepares the prompted embedding: padded, packed, or its backward."""
    dtype = getattr(torch, case.dtype)
    batch, n, d, vocabulary, s, r = case.size.values()
    problem: Any = PromptedEmbedding(n, d, s, n, r, batch, "none", dtype, vocabulary=vocabulary)
    table, peer = None, _peft_embedding
    if case.kernel == "prompted_embedding_backward":
        problem, peer = problem.backward, _peft_embedding_backward
        counted = counts.prompted_embedding_backward(batch, n, d, s, r, n, dtype.itemsize)
    else:
        # All sets share one table if it is larger than the cache, because their ids differ.
        if vocabulary * d * dtype.itemsize >= 2 * last_level_cache(device):
            table = torch.randn(vocabulary, d, device=device, dtype=dtype)
        if case.kernel == "prompted_embedding_packed":
            lengths = torch.linspace(max(1, n // 4), n, batch).round().long().tolist()
            problem = PackedEmbedding(tuple(lengths), s, d, r, dtype, vocabulary=vocabulary)
        ids = problem.inputs(device, 0, table)[0]
        rest = d, s, r, n, ids.unique().numel(), dtype.itemsize
        if case.kernel == "prompted_embedding_packed":
            counted = counts.prompted_embedding_packed(batch, ids.numel(), n, *rest)
        else:
            counted = counts.prompted_embedding(batch, n, *rest)
    arguments = input_sets(lambda seed: problem.inputs(device, seed, table), counted, device)
    prepared = _prepared(case, arguments, counted)
    if PEFT in case.providers:
        _add_peer(prepared, PEFT, peer, arguments)
    return prepared


def _by_token(case: Case, device: str) -> Prepared:
    """Prepares the prompted embedding with the token-dependent update, or its backward."""
    dtype = getattr(torch, case.dtype)
    batch, n, d, vocabulary, s, r = case.size.values()
    problem = TokenUpdate(n, d, s, r, batch, "none", dtype, vocabulary=vocabulary, operator=case.kernel)
    distinct = problem.inputs(device)[int(case.kernel.endswith("backward"))].unique().numel()
    counted = getattr(counts, case.kernel)(batch, n, d, s, r, distinct, dtype.itemsize)
    arguments = input_sets(lambda seed: problem.inputs(device, seed), counted, device)
    return _prepared(case, arguments, counted)


def _frozen(case: Case, device: str) -> Prepared:
    """Prepares the frozen model's element-wise work, forward and input gradients together."""
    work = frozen_work(case, device)
    counted = counts.frozen(case.size["rows"], case.size["width"], getattr(torch, case.dtype).itemsize)
    arguments = input_sets(work.inputs, counted, device)
    prepared = _prepared(case, arguments, counted, work.ours, work.reference)
    for provider, call in ((MODEL, work.model), (LIGER, work.liger)):
        if call is None:
            prepared.skipped[provider] = "liger_kernel is not installed"
        elif provider == LIGER and device == "cpu":
            prepared.skipped[provider] = "Liger's kernels need a GPU"
        elif provider in case.providers:
            prepared.calls[provider] = _numbered(call, arguments)
    return prepared


def _joint_prompt(case: Case, device: str) -> Prepared:
    """Prepares the joint prompt, forward and backward together."""
    s, d, r, K, h, m = case.size.values()
    problem = JointPrompt(s, d, m, r, K, h)
    counted = counts.joint_prompt(s, m, r, d, K * h, K)
    options = problem.options()
    arguments = input_sets(
        lambda seed: (problem.grad_output(device, seed), *problem.parameters(device, seed)), counted, device
    )

    def both(forward: Callable[..., Tensor], backward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda grad, *x: (forward(*x, *options), *backward(grad, *x, *options))

    ours = both(ept_kernels.joint_prompt, ept_kernels.joint_prompt_backward)
    reference = both(ept_kernels.joint_prompt_reference, ept_kernels.joint_prompt_backward_reference)
    prepared = _prepared(case, arguments, counted, ours, reference)

    def through_autograd(forward: Callable[..., Tensor]) -> Call:
        """Computes the forward once; `reference` would compute it again for the backward."""

        def call(i: int) -> tuple[Tensor, ...]:
            grad, *parameters = arguments[i]
            x = [parameter.detach().requires_grad_() for parameter in parameters]
            out = forward(*x, *options)
            return out.detach(), *torch.autograd.grad(out, x, grad, allow_unused=True, materialize_grads=True)

        return call

    plain: Any = ept_kernels.joint_prompt_reference
    if EAGER in case.providers:
        prepared.calls[EAGER] = through_autograd(plain)
    if COMPILED in case.providers:  # the forward, and with it by autograd its backward
        prepared.calls[COMPILED] = through_autograd(torch.compile(plain, fullgraph=True, dynamic=False))
    return prepared


def _four_bit(case: Case, device: str) -> Prepared:
    """Prepares the dequantisation or a product; every version gets the same bytes."""
    *tokens, rows, columns = case.size.values()
    dtype = getattr(torch, case.dtype)
    quant_type, _, nested = case.scheme.partition(" ")
    problem = FourBit(rows, columns, tuple(tokens), quant_type, nested=bool(nested), dtype=dtype)
    sizes = *tokens, rows, columns, problem.block_size, problem.nested, dtype.itemsize
    if case.kernel == "dequantize_4bit":
        counted, peer = counts.dequantize_4bit(*sizes), _bitsandbytes_dequantize
        arguments = input_sets(lambda seed: (problem.weight(device, seed), dtype), counted, device)
    else:
        backward = case.kernel == "matmul_4bit_backward"
        width, peer = (rows, _bitsandbytes_matmul_backward) if backward else (columns, _bitsandbytes_matmul)
        counted = counts.matmul_4bit(*sizes)
        arguments = input_sets(
            lambda seed: (problem.random(width, device, seed), problem.weight(device, seed)), counted, device
        )
    prepared = _prepared(case, arguments, counted)
    if BITSANDBYTES in case.providers:
        _add_peer(prepared, BITSANDBYTES, peer, arguments)
    if case.kernel == "dequantize_4bit":
        prepared.must_equal = BITSANDBYTES
    elif DENSE in case.providers:
        dense = [ept_kernels.dequantize_4bit_reference(weight, dtype) for _, weight in arguments]
        prepared.calls[DENSE] = lambda i: arguments[i][0] @ (dense[i] if backward else dense[i].mT)
    return prepared


def _prepared(
    case: Case, arguments: Arguments, counted: counts.Counts, ours: Any = None, reference: Any = None
) -> Prepared:
    """Prepares our operator and our reference, plain and compiled, all called with `arguments[i]`."""
    ours = ours or getattr(ept_kernels, case.kernel)
    reference = reference or getattr(ept_kernels, f"{case.kernel}_reference")
    calls: dict[str, Call] = {
        OURS: _numbered(ours, arguments),
        OURS_AGAIN: _numbered(ours, arguments),
        EAGER: _numbered(reference, arguments),
    }
    if COMPILED in case.providers:
        torch._dynamo.reset()
        compiled = torch.compile(reference, fullgraph=True, dynamic=False)
        calls[COMPILED] = lambda i: compiled(*arguments[i])
    return Prepared(
        {name: call for name, call in calls.items() if name in case.providers},
        len(arguments),
        counted,
        lambda: reference(*arguments[0]),
        TOLERANCES[getattr(torch, case.dtype)],
    )


def _numbered(function: Callable[..., Any], arguments: Arguments) -> Call:
    return lambda i: function(*arguments[i])


def _copy(moved: int, sets: int, device: str) -> Call:
    """Copies between as many pairs of tensors as there are input sets, reading and writing this many bytes in total."""
    half = max(1, moved // 2)
    sources = [torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    return lambda i: targets[i].copy_(sources[i])


def _add_peer(prepared: Prepared, provider: str, make: Callable[[Arguments], Call], arguments: Arguments) -> None:
    """Adds a version that needs a library, or the reason why that library cannot be used."""
    if importlib.util.find_spec(provider.lower()) is None:
        prepared.skipped[provider] = f"{provider.lower()} is not installed"
        return
    try:
        prepared.calls[provider] = make(arguments)
    except Exception as error:  # whatever a peer raises here becomes the reason in its row
        prepared.skipped[provider] = f"{type(error).__name__}: {error}"


def _peft_embedding(arguments: Arguments) -> Call:
    """Does what `PeftModelForSeq2SeqLM.forward` does between ids and `inputs_embeds`."""
    forwards = [_peft_prompt(prompt, table)[0] for _, _, table, prompt, *_ in arguments]

    @torch.no_grad()
    def call(i: int) -> Tensor:
        ids, _, table = arguments[i][:3]
        return forwards[i](torch.nn.functional.embedding(ids, table))

    return call


def _peft_embedding_backward(arguments: Arguments) -> Call:
    """Runs autograd through the same, for the gradient of the prompt; the embeddings of the tokens are frozen."""
    graphs = []
    for gradient, positions, *_ in arguments:
        tokens = positions.shape[1]
        forward, weight = _peft_prompt(gradient[0, tokens:], gradient)
        graphs.append((forward(torch.zeros_like(gradient[:, :tokens])), weight, gradient))
    return _gradients(graphs)


def _peft_prompt(prompt: Tensor, like: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns PEFT's function from the tokens' embeddings to those with `prompt` before them, and its parameter."""
    from peft import PromptEmbedding, PromptTuningConfig

    sizes = {"num_virtual_tokens": prompt.shape[0], "token_dim": prompt.shape[1], "num_transformer_submodules": 1}
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", prompt_tuning_init="RANDOM", **sizes)
    encoder = PromptEmbedding(config, None).to(like.device)
    weight = encoder.embedding.weight
    with torch.no_grad():
        weight.copy_(prompt)

    def forward(tokens: Tensor) -> Tensor:
        indices = torch.arange(len(weight), device=tokens.device).expand(len(tokens), -1)
        return torch.cat((encoder(indices).to(tokens.dtype), tokens), dim=1)

    return forward, weight


def _bitsandbytes_dequantize(arguments: Arguments) -> Call:
    from bitsandbytes import functional

    states = [_packed_and_state(weight, dtype) for weight, dtype in arguments]
    return lambda i: functional.dequantize_4bit(*states[i])


def _bitsandbytes_matmul(arguments: Arguments) -> Call:
    """Leaves the choice between fused kernel and dequantisation to bitsandbytes, as without gradients."""
    import bitsandbytes

    states = [(x, *_packed_and_state(weight, x.dtype)) for x, weight in arguments]
    return torch.no_grad()(lambda i: bitsandbytes.matmul_4bit(*states[i]))


def _bitsandbytes_matmul_backward(arguments: Arguments) -> Call:
    """Runs autograd through `MatMul4Bit`: the gradient of the input."""
    import bitsandbytes

    graphs = []
    for gradient, weight in arguments:
        x = gradient.new_zeros(gradient.shape[0], weight.columns, requires_grad=True)
        out = bitsandbytes.matmul_4bit(x, *_packed_and_state(weight, gradient.dtype))
        graphs.append((out, x, gradient))
    return _gradients(graphs)


def _gradients(graphs: list[tuple[Tensor, Tensor, Tensor]]) -> Call:
    """Computes a gradient through a graph, given as its output, the chosen input, and the gradient of the output."""
    return lambda i: torch.autograd.grad(*graphs[i], retain_graph=True)[0]


def _packed_and_state(weight: FourBitWeight, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Returns the packed weight and its quant state in bitsandbytes' form, over the same bytes."""
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


def input_sets(inputs: Callable[[int], tuple[Any, ...]], counted: counts.Counts, device: str) -> list[tuple[Any, ...]]:
    """Makes sets of inputs, by seed, that together are larger than the cache and no larger than `MAX_BYTES`."""
    first = inputs(0)
    parts = [part for x in first for part in (x.tensors if isinstance(x, FourBitWeight) else [x])]
    held = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    number = copies(counted.bytes, last_level_cache(device), min(MAX_SETS, max(2, MAX_BYTES // max(held, 1))))
    return [first, *map(inputs, range(1, number))]


def copies(touched: int, cache: int, maximum: int) -> int:
    """Returns the number of input sets through which to rotate, together twice the last-level cache: at least 2."""
    return max(2, min(maximum, math.ceil(2 * cache / max(touched, 1))))


def last_level_cache(device: str) -> int:
    """Returns the bytes of the device's last-level cache."""
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else CPU_CACHE
