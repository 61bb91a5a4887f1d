"""Cases made ready to run: several sets of inputs, the least work they take, and a call for each of our versions.

The inputs are those of `ept_kernels.dev.problems`; the libraries we are compared with stand in `peers.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ept_kernels
from ept_kernels.dev.problems import FourBit, JointPrompt, PackedEmbedding, PromptedEmbedding

from . import counts, peers
from .shapes import BITSANDBYTES, COMPILED, DENSE, EAGER, OURS, OURS_AGAIN, PEFT, Case
from .timing import Call

MAX_BYTES = 8 << 30  # of all input sets of one case together
MAX_SETS = 256
CPU_CACHE = 32 << 20  # assumed: PyTorch does not tell the size of a CPU's last-level cache

# ‖out − reference‖ / ‖reference‖ that a version may reach before its time counts.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Arguments = Sequence[tuple[Any, ...]]


@dataclass
class Prepared:
    """Calls by version, each taking the number of an input set.

    Attributes:
        calls: what can run. skipped: version → why it cannot. sets: number of input sets.
        counted: the least bytes and operations of one call.
        reference: gives what every version must give on set 0.
        tolerance: relative error that a version may have. must_equal: version that ours has to equal bit for bit.
    """

    calls: dict[str, Call]
    sets: int
    counted: counts.Counts
    reference: Callable[[], Any]
    tolerance: float
    skipped: dict[str, str] = field(default_factory=dict)
    must_equal: str = ""


def prepare(case: Case, device: str, compile_allowed: bool = True) -> Prepared | None:
    """Makes `case` ready on `device`; None where the operator does not exist."""
    if not hasattr(ept_kernels, case.kernel):
        return None
    if "4bit" in case.kernel:
        make = _four_bit
    else:
        make = _joint_prompt if case.kernel == "joint_prompt" else _embedding
    prepared = make(case, device)
    if not compile_allowed and prepared.calls.pop(COMPILED, None):
        prepared.skipped[COMPILED] = "not compiled in a reduced run"
    return prepared


def _embedding(case: Case, device: str) -> Prepared:
    """Prepares the prompted embedding: padded, packed, or its backward."""
    size, dtype = case.size, getattr(torch, case.dtype)
    batch, n, d, vocabulary, s, r = (size[k] for k in ("batch", "length", "width", "vocabulary", "prompt", "rank"))
    padded = PromptedEmbedding(batch=batch, n=n, m=n, d=d, s=s, r=r, dtype=dtype, vocabulary=vocabulary, padding="none")
    if case.kernel == "prompted_embedding_backward":
        counted = counts.prompted_embedding_backward(batch, n, d, s, r, n, dtype.itemsize)
        arguments = input_sets(lambda seed: padded.backward.inputs(device, seed), counted, device)
        prepared = _prepared(case, arguments, counted)
        if PEFT in case.providers:
            _add_peer(prepared, PEFT, lambda: peers.peft_embedding_backward(arguments, s))
        return prepared

    # One table for all sets where it is larger than the cache, since their ids differ.
    table = None
    if vocabulary * d * dtype.itemsize >= 2 * last_level_cache(device):
        table = torch.randn(vocabulary, d, device=device, dtype=dtype)
    problem: PromptedEmbedding | PackedEmbedding = padded
    tokens = batch * n
    if case.kernel == "prompted_embedding_packed":
        lengths = torch.linspace(max(1, n // 4), n, batch).round().long().tolist()
        problem = PackedEmbedding(tuple(lengths), s=s, d=d, r=r, dtype=dtype, vocabulary=vocabulary)
        tokens = sum(lengths)
    distinct = problem.inputs(device, 0, table)[0].unique().numel()
    if case.kernel == "prompted_embedding_packed":
        counted = counts.prompted_embedding_packed(batch, tokens, n, d, s, r, n, distinct, dtype.itemsize)
    else:
        counted = counts.prompted_embedding(batch, n, d, s, r, n, distinct, dtype.itemsize)
    arguments = input_sets(lambda seed: problem.inputs(device, seed, table), counted, device)
    prepared = _prepared(case, arguments, counted)
    if PEFT in case.providers:
        _add_peer(prepared, PEFT, lambda: peers.peft_embedding(arguments))
    return prepared


def _joint_prompt(case: Case, device: str) -> Prepared:
    """Prepares the joint prompt, forward and backward together."""
    names = ("prompt", "width", "rank", "positions", "spaces", "space_width")
    s, d, r, m, K, h = (case.size[k] for k in names)
    problem = JointPrompt(s=s, d=d, r=r, m=m, K=K, h=h)
    counted = counts.joint_prompt(s, m, r, d, K * h, K)
    arguments = input_sets(
        lambda seed: (problem.grad_output(device, seed), problem.parameters(device, seed), problem.options()),
        counted,
        device,
    )

    def both(forward: Callable[..., Tensor], backward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda grad, x, options: (forward(*x, *options), *backward(grad, *x, *options))

    def compiled_forward(grad: Tensor, parameters: list[Tensor], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
        x = [parameter.detach().requires_grad_() for parameter in parameters]
        out = compiled(*x, *options)
        return out.detach(), *torch.autograd.grad(out, x, grad, allow_unused=True, materialize_grads=True)

    prepared = _prepared(
        case,
        arguments,
        counted,
        ours=both(ept_kernels.joint_prompt, ept_kernels.joint_prompt_backward),
        reference=both(ept_kernels.joint_prompt_reference, ept_kernels.joint_prompt_backward_reference),
    )
    if COMPILED in case.providers:
        # Of the forward alone: its backward is compiled with it.
        compiled = torch.compile(ept_kernels.joint_prompt_reference, fullgraph=True, dynamic=False)
        prepared.calls[COMPILED] = lambda i: compiled_forward(*arguments[i])
    return prepared


def _four_bit(case: Case, device: str) -> Prepared:
    """Prepares the dequantisation or a product; every version gets the same bytes."""
    rows, columns, dtype = case.size["rows"], case.size["columns"], getattr(torch, case.dtype)
    quant_type, _, nested = case.scheme.partition(" ")
    problem = FourBit(
        rows, columns, quant_type=quant_type, nested=bool(nested), dtype=dtype, tokens=(case.size.get("m", 1),)
    )
    block_size = problem.block_size
    if case.kernel == "dequantize_4bit":
        counted = counts.dequantize_4bit(rows, columns, block_size, bool(nested), dtype.itemsize)
        arguments = input_sets(lambda seed: (problem.weight(device, seed), dtype), counted, device)
        prepared = _prepared(case, arguments, counted)
        prepared.must_equal = BITSANDBYTES
        _add_peer(prepared, BITSANDBYTES, lambda: peers.bitsandbytes_dequantize(arguments))
        return prepared

    backward = case.kernel == "matmul_4bit_backward"
    counted = counts.matmul_4bit(case.size["m"], rows, columns, block_size, bool(nested), dtype.itemsize)
    width = rows if backward else columns
    arguments = input_sets(
        lambda seed: (problem.random(width, device, seed), problem.weight(device, seed)), counted, device
    )
    prepared = _prepared(case, arguments, counted)
    peer = peers.bitsandbytes_matmul_backward if backward else peers.bitsandbytes_matmul
    _add_peer(prepared, BITSANDBYTES, lambda: peer(arguments))
    dense = [ept_kernels.dequantize_4bit_reference(weight, dtype) for _, weight in arguments]
    prepared.calls[DENSE] = lambda i: arguments[i][0] @ (dense[i] if backward else dense[i].mT)
    return prepared


def _prepared(
    case: Case,
    arguments: Arguments,
    counted: counts.Counts,
    ours: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
) -> Prepared:
    """Prepares our operator and our reference, plain and compiled, all called with `arguments[i]`."""
    ours = ours or getattr(ept_kernels, case.kernel)
    reference = reference or getattr(ept_kernels, f"{case.kernel}_reference")
    calls: dict[str, Call] = {
        OURS: lambda i: ours(*arguments[i]),
        OURS_AGAIN: lambda i: ours(*arguments[i]),
        EAGER: lambda i: reference(*arguments[i]),
    }
    if COMPILED in case.providers:
        torch._dynamo.reset()
        compiled = torch.compile(reference, fullgraph=True, dynamic=False)
        calls[COMPILED] = lambda i: compiled(*arguments[i])
    return Prepared(
        calls={name: call for name, call in calls.items() if name in case.providers},
        sets=len(arguments),
        counted=counted,
        reference=lambda: reference(*arguments[0]),
        tolerance=TOLERANCES[getattr(torch, case.dtype)],
    )


def _add_peer(prepared: Prepared, provider: str, make: Callable[[], Call]) -> None:
    """Adds a version that needs a library, or the reason why that library cannot be used."""
    library = provider.lower()
    if importlib.util.find_spec(library) is None:
        prepared.skipped[provider] = f"{library} is not installed"
        return
    try:
        prepared.calls[provider] = make()
    except Exception as error:  # whatever a peer raises here is the reason that its row gives
        prepared.skipped[provider] = f"{type(error).__name__}: {error}"


def input_sets(inputs: Callable[[int], tuple[Any, ...]], counted: counts.Counts, device: str) -> list[tuple[Any, ...]]:
    """Makes sets of inputs, by seed, that together are larger than the cache and no larger than `MAX_BYTES`."""
    first = inputs(0)
    held = sum(x.nbytes for x in _tensors(first))
    number = copies(counted.bytes, last_level_cache(device), min(MAX_SETS, max(2, MAX_BYTES // max(held, 1))))
    return [first, *map(inputs, range(1, number))]


def copies(touched: int, cache: int, maximum: int) -> int:
    """Return the number of input sets to rotate among, together twice the last-level cache: at least 2."""
    return max(2, min(maximum, math.ceil(2 * cache / max(touched, 1))))


def last_level_cache(device: str) -> int:
    """Return the bytes of the device's last-level cache."""
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else CPU_CACHE


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, ept_kernels.FourBitWeight):
        yield from _tensors(nested.tensors)
    elif isinstance(nested, (tuple, list)):
        for part in nested:
            yield from _tensors(part)
