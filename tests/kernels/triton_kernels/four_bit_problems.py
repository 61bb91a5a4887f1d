"""Helpers of the tests of 4-bit kernels: bitsandbytes' answers, and a watch over the memory touched."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

from ept_kernels import FourBitWeight, dequantize_4bit_reference, launch

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def dequantized_by_bitsandbytes(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Returns what bitsandbytes makes of the same bytes, on the same device.

    On a CPU it is asked for one long row: its code there mistakes blocks that straddle rows, though it writes them.
    Where it is not installed the reference stands in, which equals it bit for bit (`tests/kernels/test_four_bit.py`).
    """
    if not HAS_BITSANDBYTES:
        return dequantize_4bit_reference(weight, dtype)
    from bitsandbytes import functional as bnb

    shape = torch.Size((weight.rows, weight.columns))
    nested = None
    if weight.nested:
        nested = bnb.QuantState(
            weight.nested_absmax, code=weight.nested_code, blocksize=weight.nested_block_size, dtype=torch.float32
        )
    state = bnb.QuantState(
        weight.absmax,
        shape=torch.Size((1, shape.numel())) if weight.packed.device.type == "cpu" else shape,
        code=bnb.get_4bit_type(weight.quant_type, device=weight.packed.device),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=weight.nested_offset,
        state2=nested,
    )
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its plain version
        return bnb.dequantize_4bit(weight.packed[:, None], state).view(shape)


def levels_of_bitsandbytes(quant_type: str, device: torch.device) -> Tensor:
    """Returns the 16 levels; skips the test where bitsandbytes is not installed."""
    return pytest.importorskip("bitsandbytes").functional.get_4bit_type(quant_type, device=device)


def units_apart(actual: Tensor, expected: Tensor) -> int:
    """Largest distance in units in the last place between two 16-bit tensors; both zeros are the same number."""
    ordered = [torch.where(i < 0, -(i + 2**15), i) for i in (x.view(torch.int16).int() for x in (actual, expected))]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.fixture(autouse=True)
def watched_memory(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Under the interpreter every address that a kernel reads or writes has to lie in one of the tensors that it was
    given, at a multiple of its size, as on a GPU.
    """
    if INTERPRETED:
        _watch_addresses(monkeypatch)


def _watch_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    builder, allowed = interpreter.interpreter_builder, []
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(p: Any, mask: Any, what: str) -> None:
        size = p.get_element_ty().primitive_bitwidth // 8
        first = p.data[mask.data].astype("int64")
        inside = sum(((first >= low) & (first + size <= high)).astype(int) for low, high in allowed)
        assert (inside > 0).all(), f"{what} of {int((inside == 0).sum())} addresses outside of every tensor"
        assert (first % size == 0).all(), f"{what} of {size} bytes at addresses that are no multiples of it"

    def checked_load(ptrs: Any, mask: Any, *args: Any) -> Any:
        check(ptrs, mask, "load")
        return load(ptrs, mask, *args)

    def checked_store(ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        check(ptrs, mask, "store")
        return store(ptrs, value, mask, *args)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    unwatched = launch.launch

    def watched(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        allowed[:] = [_extent(x) for x in args if isinstance(x, Tensor) and x.numel()]
        unwatched(kernel, grid, *args, **meta)

    monkeypatch.setattr(launch, "launch", watched)


def raise_programs(monkeypatch: pytest.MonkeyPatch, *by: int) -> None:
    """Makes the interpreter raise the number of every program by so many along each axis: only the last ones run."""
    from triton.runtime.interpreter import interpreter_builder

    number = type(interpreter_builder).create_get_program_id

    def raised(axis: int) -> Any:
        handle = number(interpreter_builder, axis)
        handle.data = handle.data + by[axis]
        return handle

    monkeypatch.setattr(interpreter_builder, "create_get_program_id", raised)


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of `x` and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def covers(problems: list[Any], **promised: set[Any]) -> list[str]:
    """Which promised combinations of the fields' values no problem has: pairs of every two fields."""
    missing = []
    for (a, of_a), (b, of_b) in itertools.combinations(promised.items(), 2):
        there = {(getattr(p, a), getattr(p, b)) for p in problems}
        missing += [f"{a}={x}, {b}={y}" for x, y in itertools.product(of_a, of_b) if (x, y) not in there]
    return missing
