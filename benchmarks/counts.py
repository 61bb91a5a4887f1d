"""The minimum work of every operator: bytes that must move through device memory, and operations that must be done.

Bytes: each input read once, each output written once, and of the embedding table only the rows that are looked up.
Operations: multiplications and additions of the matrix products, two for each pair of factors; element-wise work
(softmax, normalisation, decoding of 4-bit codes) is not counted. Divided by the machine's measured rates, both
give the floor against which a time is held.
"""

from __future__ import annotations

from typing import NamedTuple

ID_BYTES = 8  # int64 ids and positions
PARAMETER_BYTES = 4  # the prompt's parameters are float32


class Counts(NamedTuple):
    """Minimum `bytes` moved and floating-point `operations`."""

    bytes: int
    operations: int


def prompted_embedding(
    batch: int, length: int, width: int, prompt: int, rank: int, positions: int, distinct: int, item: int
) -> Counts:
    """Counts the padded forward: `distinct` table rows read, `batch · (prompt + length)` rows written, `item` bytes per
    element. Without an update (rank 0) no positions are read.
    """
    index = ID_BYTES * batch * length * (2 if rank else 1)
    rows = distinct + batch * (prompt + length)
    moved = index + rows * width * item + _parameters(prompt, positions, rank, width)
    return Counts(moved, 2 * min(positions, length) * rank * width)


def prompted_embedding_packed(
    texts: int, tokens: int, longest: int, width: int, prompt: int, rank: int, positions: int, distinct: int, item: int
) -> Counts:
    """Counts the padding-free forward over `tokens` tokens of `texts` texts, of at most `longest` tokens; positions
    follow from the `texts + 1` offsets.
    """
    index = ID_BYTES * (tokens + texts + 1)
    rows = distinct + tokens + texts * prompt
    moved = index + rows * width * item + _parameters(prompt, positions, rank, width)
    return Counts(moved, 2 * min(positions, longest) * rank * width)


def prompted_embedding_backward(
    batch: int, length: int, width: int, prompt: int, rank: int, positions: int, item: int
) -> Counts:
    """Counts the incoming gradient, the positions, A and B read once; their gradients and the prompt's
    written. Operations: one addition per element of the gradient, and the two products over the summed rows.
    """
    gradient = batch * (prompt + length) * width
    index = ID_BYTES * batch * length if rank else 0
    parameters = _parameters(0, positions, rank, width) + _parameters(prompt, positions, rank, width)
    operations = gradient + 4 * min(positions, length) * rank * width
    return Counts(gradient * item + index + parameters, operations)


def prompted_embedding_by_token(
    batch: int, length: int, width: int, prompt: int, rank: int, distinct: int, item: int
) -> Counts:
    """Counts the forward with the token-dependent update: ids and positions, table rows and parameters read, the
    output and the bottleneck's activations written. Operations: the two products of every token.
    """
    tokens = batch * length
    rows = distinct + batch * (prompt + length)
    moved = 2 * ID_BYTES * tokens + rows * width * item + PARAMETER_BYTES * (prompt * width + tokens * rank)
    return Counts(moved + _bottleneck(rank, width), 4 * tokens * rank * width)


def prompted_embedding_by_token_backward(
    batch: int, length: int, width: int, prompt: int, rank: int, distinct: int, item: int
) -> Counts:
    """Counts the incoming gradient, ids and positions, table rows, `W_out` and the activations read; the gradients of
    these and of the parameters written. Operations: the three products of every token, and one addition per element.
    """
    tokens, gradient = batch * length, batch * (prompt + length) * width
    moved = (gradient + distinct * width) * item + 2 * ID_BYTES * tokens
    of_parameters = PARAMETER_BYTES * (rank * width + prompt * width + 2 * tokens * rank) + _bottleneck(rank, width)
    return Counts(moved + of_parameters, gradient + 6 * tokens * rank * width)


def _bottleneck(rank: int, width: int) -> int:
    return PARAMETER_BYTES * (2 * rank * width + rank + width)


def joint_prompt(prompt: int, positions: int, rank: int, width: int, columns: int, spaces: int) -> Counts:
    """Counts forward and backward of the joint prompt without learned maps: `columns` = K·h over `spaces` = K spaces.

    Forward: `P̂·[D | G | Bᵀ | P_sᵀ]`, `B·Bᵀ`, the rank-space products, `[·]·[B; P_s; U]`. The backward of every
    product is two of the same size.
    """
    reduce = prompt * width * (columns + spaces + rank + prompt) + rank * rank * width
    between = positions * rank * rank + 2 * prompt * positions * rank
    expand = prompt * width * (rank + prompt + columns)
    parameters = _parameters(prompt, positions, rank, width) + PARAMETER_BYTES * width * (2 * columns + spaces)
    # Forward: parameters read, the prompt written; backward: parameters and gradient read, their gradients written.
    return Counts(3 * parameters + 2 * PARAMETER_BYTES * prompt * width, 3 * 2 * (reduce + between + expand))


def frozen(rows: int, width: int, item: int) -> Counts:
    """Counts forward and backward of a frozen norm with its residual, of rotary embedding, or of a gated activation.

    Each reads or writes eight tensors of `rows · width` elements in total. Weights and angles are not counted.
    """
    return Counts(8 * rows * width * item, 0)


def four_bit_weight(rows: int, columns: int, block_size: int, nested: bool, nested_block_size: int = 256) -> int:
    """Counts the bytes of a packed weight: half a byte per element, and its absmax: float32 per block or, if nested,
    one byte per block, float32 per block of blocks, a 256-entry float32 table and an offset.
    """
    elements = rows * columns
    blocks = -(-elements // block_size)
    absmax = blocks + 4 * (-(-blocks // nested_block_size) + 256 + 1) if nested else 4 * blocks
    return -(-elements // 2) + absmax


def dequantize_4bit(rows: int, columns: int, block_size: int, nested: bool, item: int) -> Counts:
    """Counts the packed weight read and `rows · columns` elements of `item` bytes written."""
    return Counts(four_bit_weight(rows, columns, block_size, nested) + rows * columns * item, 0)


def matmul_4bit(m: int, rows: int, columns: int, block_size: int, nested: bool, item: int) -> Counts:
    """Counts `[m, columns] · [rows, columns]ᵀ`, or equally its input gradient `[m, rows] · [rows, columns]`."""
    activations = m * (rows + columns) * item
    return Counts(four_bit_weight(rows, columns, block_size, nested) + activations, 2 * m * rows * columns)


def _parameters(prompt: int, positions: int, rank: int, width: int) -> int:
    return PARAMETER_BYTES * (prompt * width + positions * rank + rank * width)
