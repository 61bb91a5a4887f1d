"""The counted bytes and operations, against numbers worked out by hand or read off real tensors."""

from __future__ import annotations

import pytest
import torch

import ept_kernels
from benchmarks import counts
from ept_kernels.dev.problems import FourBit, TokenUpdate


def test_prompted_embedding_of_the_goal_reads_and_writes_what_was_worked_out_by_hand() -> None:
    counted = counts.prompted_embedding(
        batch=32, length=512, width=4096, prompt=40, rank=30, positions=512, distinct=32 * 512, item=2
    )
    rows, out = 32 * 512 * 4096 * 2, 32 * 552 * 4096 * 2  # 134 MB of table rows, 145 MB
    index, parameters = 2 * 32 * 512 * 8, 4 * (40 * 4096 + 512 * 30 + 30 * 4096)
    assert counted.bytes == rows + out + index + parameters
    assert counted.operations == 2 * 512 * 30 * 4096


@pytest.mark.parametrize("rank, extra", [(0, 0), (4, 8 * 2 * 8 + 4 * (8 * 4 + 4 * 32))])
def test_rank_zero_reads_neither_positions_nor_factors(rank: int, extra: int) -> None:
    counted = counts.prompted_embedding(2, 8, 32, 3, rank, 8, distinct=10, item=4)
    assert counted.bytes == 8 * 2 * 8 + 10 * 32 * 4 + 4 * 3 * 32 + 2 * 11 * 32 * 4 + extra


def test_packed_counts_as_many_output_rows_as_the_operator_writes() -> None:
    lengths, width, prompt, rank = torch.tensor([3, 8]), 32, 3, 4
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = int(lengths.sum())
    table, p, A, B = (torch.randn(shape) for shape in ((128, width), (prompt, width), (8, rank), (rank, width)))
    ids = torch.randperm(128)[:tokens]
    out = ept_kernels.prompted_embedding_packed(ids, cu_seqlens, table, p, A, B, 1.0)
    counted = counts.prompted_embedding_packed(2, tokens, 8, width, prompt, rank, 8, distinct=tokens, item=4)
    read = [ids, cu_seqlens, p, A, B, table[ids]]
    assert counted.bytes == out.nbytes + sum(tensor.nbytes for tensor in read)


def test_backward_counts_its_inputs_and_outputs_once() -> None:
    batch, length, width, prompt, rank = 2, 8, 32, 3, 4
    gradient = torch.randn(batch, prompt + length, width)
    positions = torch.arange(length).expand(batch, -1).contiguous()
    A, B = torch.randn(length, rank), torch.randn(rank, width)
    outputs = ept_kernels.prompted_embedding_backward(gradient, positions, A, B, 1.0)
    counted = counts.prompted_embedding_backward(batch, length, width, prompt, rank, length, item=4)
    assert counted.bytes == sum(tensor.nbytes for tensor in (gradient, positions, A, B, *outputs))


def test_an_update_by_the_token_counts_its_inputs_and_outputs_once() -> None:
    problem = TokenUpdate(n=8, d=32, s=3, r=4, batch=2, padding="none")
    for p, index in ((problem, 2), (problem.backward, 3)):
        inputs = list(p.inputs())
        outputs = getattr(ept_kernels, p.operator)(*inputs)
        counted = getattr(counts, p.operator)(2, 8, 32, 3, 4, distinct=16, item=4)
        inputs[index] = inputs[index][:16]  # the rows of the table that are read
        read = [x for x in inputs if isinstance(x, torch.Tensor)]
        assert counted.bytes == sum(tensor.nbytes for tensor in (*read, *outputs))


def test_joint_prompt_counts_parameters_gradients_and_both_rows() -> None:
    prompt, positions, rank, width, columns, spaces = 3, 8, 4, 32, 4, 2
    parameters = 4 * (prompt * width + positions * rank + rank * width + width * (2 * columns + spaces))
    counted = counts.joint_prompt(prompt, positions, rank, width, columns, spaces)
    # forward: parameters in, P out; backward: parameters and gradient of P in, gradients of the parameters out
    assert counted.bytes == 3 * parameters + 2 * 4 * prompt * width


@pytest.mark.parametrize("rows, columns", [(64, 64), (5, 67), (257, 1000)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_packed_weight_has_as_many_bytes_as_its_tensors(rows: int, columns: int, nested: bool) -> None:
    weight = FourBit(rows, columns, nested=nested).weight()
    held = sum(part.nbytes for part in weight.tensors if part is not None)
    assert counts.four_bit_weight(rows, columns, 64, nested) == held


def test_four_bit_goal_shapes() -> None:
    counted = counts.dequantize_4bit(14336, 4096, 64, nested=True, item=2)
    assert counted.bytes == pytest.approx(147e6, rel=0.02)  # half a byte read and two written an element
    product = counts.matmul_4bit(2048, 4096, 4096, 64, nested=True, item=2)
    assert product.operations == 2 * 2048 * 4096 * 4096
