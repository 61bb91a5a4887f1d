"""Problems of the 4-bit operators. One random packed weight a set of inputs, shared byte for byte by every version.

The bytes are drawn, not quantised from a weight: the time does not depend on them, and no quantiser is needed where
bitsandbytes is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ept_kernels

from . import counts
from .problems import Problem, add_peer, input_sets, normal, problem_of
from .shapes import BITSANDBYTES, DENSE, Case
from .timing import Call

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
LEVEL = 0.02  # of the largest weight of a block


class Packed(NamedTuple):
    """The parts of a packed weight; the nested ones are None where absmax is plain."""

    packed: Tensor  # uint8 [⌈rows·columns/2⌉]
    absmax: Tensor  # float32 or uint8 [blocks]
    nested_absmax: Tensor | None  # float32 [⌈blocks/256⌉]
    nested_code: Tensor | None  # float32 [256]
    nested_offset: Tensor | None  # float32 []
    quant_type: str
    rows: int
    columns: int


def random_weight(rows: int, columns: int, scheme: str, device: str) -> Packed:
    """A weight of `scheme`: `nf4` or `fp4`, or either with ` nested` behind it."""
    quant_type, _, nested = scheme.partition(" ")
    elements = rows * columns
    blocks = -(-elements // BLOCK_SIZE)
    packed = torch.randint(256, (-(-elements // 2),), dtype=torch.uint8, device=device)
    if not nested:
        absmax = LEVEL * (0.5 + torch.rand(blocks, device=device))
        return Packed(packed, absmax, None, None, None, quant_type, rows, columns)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    nested_absmax = 0.5 * LEVEL * torch.rand(-(-blocks // NESTED_BLOCK_SIZE), device=device)
    nested_code = torch.linspace(-1, 1, 256, device=device)
    return Packed(
        packed, absmax, nested_absmax, nested_code, torch.tensor(LEVEL, device=device), quant_type, rows, columns
    )


def build(case: Case, device: str) -> Problem:
    """The problem of a 4-bit case."""
    return {"dequantize_4bit": _dequantize, "matmul_4bit": _matmul, "matmul_4bit_backward": _matmul_backward}[
        case.kernel
    ](case, device)


def _dequantize(case: Case, device: str) -> Problem:
    rows, columns, dtype = case.size["rows"], case.size["columns"], getattr(torch, case.dtype)
    counted = counts.dequantize_4bit(rows, columns, BLOCK_SIZE, case.scheme.endswith("nested"), dtype.itemsize)
    weights = [
        weight
        for (weight,) in input_sets(lambda: (random_weight(rows, columns, case.scheme, device),), counted, device)
    ]
    arguments = [(four_bit_weight(weight), dtype) for weight in weights]
    problem = problem_of(
        case, ept_kernels.dequantize_4bit, ept_kernels.dequantize_4bit_reference, arguments, counted, dtype
    )
    problem.must_equal = BITSANDBYTES
    add_peer(problem, BITSANDBYTES, lambda: _bitsandbytes_dequantize(weights, dtype))
    return problem


def _matmul(case: Case, device: str) -> Problem:
    return _product(
        case,
        device,
        width=case.size["columns"],
        ours=ept_kernels.matmul_4bit,
        reference=ept_kernels.matmul_4bit_reference,
        dense=lambda x, weight: x @ weight.mT,
        bitsandbytes=_bitsandbytes_matmul,
    )


def _matmul_backward(case: Case, device: str) -> Problem:
    return _product(
        case,
        device,
        width=case.size["rows"],
        ours=ept_kernels.matmul_4bit_backward,
        reference=ept_kernels.matmul_4bit_backward_reference,
        dense=lambda gradient, weight: gradient @ weight,
        bitsandbytes=_bitsandbytes_matmul_backward,
    )


def _product(
    case: Case,
    device: str,
    width: int,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    dense: Callable[[Tensor, Tensor], Tensor],
    bitsandbytes: Callable[[list[tuple[Tensor, Packed]], torch.dtype], Call],
) -> Problem:
    """Either product: `width` is the length of a row of activations."""
    m, rows, columns, dtype = (*(case.size[k] for k in ("m", "rows", "columns")), getattr(torch, case.dtype))
    counted = counts.matmul_4bit(m, rows, columns, BLOCK_SIZE, case.scheme.endswith("nested"), dtype.itemsize)

    def inputs() -> tuple[Tensor, Packed]:
        return normal(m, width, device=device, dtype=dtype), random_weight(rows, columns, case.scheme, device)

    sets = input_sets(inputs, counted, device)
    arguments = [(x, four_bit_weight(weight)) for x, weight in sets]
    problem = problem_of(case, ours, reference, arguments, counted, dtype)
    add_peer(problem, BITSANDBYTES, lambda: bitsandbytes(sets, dtype))
    weights = [ept_kernels.dequantize_4bit_reference(weight, dtype) for _, weight in arguments]
    problem.calls[DENSE] = lambda i: dense(arguments[i][0], weights[i])
    return problem


def four_bit_weight(weight: Packed) -> ept_kernels.FourBitWeight:
    """The same bytes as our operators take them."""
    return ept_kernels.FourBitWeight(
        **weight._asdict(),
        block_size=BLOCK_SIZE,
        nested_block_size=0 if weight.nested_code is None else NESTED_BLOCK_SIZE,
    )


# bitsandbytes, on the same bytes.


def _quant_state(weight: Packed, dtype: torch.dtype) -> Any:
    from bitsandbytes import functional

    state2 = None
    if weight.nested_code is not None:
        state2 = functional.QuantState(
            absmax=weight.nested_absmax, code=weight.nested_code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
        )
    return functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size((weight.rows, weight.columns)),
        code=functional.get_4bit_type(weight.quant_type, device=weight.packed.device),
        blocksize=BLOCK_SIZE,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=weight.nested_offset,
        state2=state2,
    )


def _bitsandbytes_dequantize(weights: list[Packed], dtype: torch.dtype) -> Call:
    from bitsandbytes import functional

    states = [(weight.packed.view(-1, 1), _quant_state(weight, dtype)) for weight in weights]
    return lambda i: functional.dequantize_4bit(*states[i])


def _bitsandbytes_matmul(sets: list[tuple[Tensor, Packed]], dtype: torch.dtype) -> Call:
    """Its own choice between the fused kernel and dequantisation, as without gradients."""
    import bitsandbytes

    states = [(x, weight.packed.view(-1, 1), _quant_state(weight, dtype)) for x, weight in sets]

    def call(i: int) -> Tensor:
        with torch.no_grad():
            return bitsandbytes.matmul_4bit(*states[i])

    return call


def _bitsandbytes_matmul_backward(sets: list[tuple[Tensor, Packed]], dtype: torch.dtype) -> Call:
    """Autograd through `MatMul4Bit`: the gradient of the input."""
    import bitsandbytes

    graphs = []
    for gradient, weight in sets:
        x = gradient.new_zeros(gradient.shape[0], weight.columns, requires_grad=True)
        out = bitsandbytes.matmul_4bit(x, weight.packed.view(-1, 1), _quant_state(weight, dtype))
        graphs.append((out, x, gradient))

    def call(i: int) -> Tensor:
        out, x, gradient = graphs[i]
        return torch.autograd.grad(out, x, gradient, retain_graph=True)[0]

    return call
