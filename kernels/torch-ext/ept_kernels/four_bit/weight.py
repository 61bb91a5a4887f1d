"""`FourBitWeight`: a matrix in bitsandbytes' 4-bit format (NF4 or FP4, plain or nested), checked and never copied.

A byte holds two neighbouring weights of the flattened matrix, the first in its high nibble. A nibble names one of the
16 levels of `quant_type`; a weight is its level times the absmax of its block of `block_size` neighbours. Blocks
may straddle rows, and the last one may be short. Nested absmax is itself kept in one byte a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# bitsandbytes' tables in the order of the nibbles; every number is an exact float32.
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_MAGNITUDES, *(0.0 - level for level in _FP4_MAGNITUDES))  # nibble 8 is an unsigned zero
LEVELS = {"nf4": NF4, "fp4": FP4}

_TABLE_BYTES = 64  # alignment, so that kernels can add an offset to the table's address with one `or`

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

# Fields in the order of the operators' schemas.
SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, "
    "{} str quant_type, int block_size, int nested_block_size, int rows, int columns"
)


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A `[rows, columns]` matrix of 4-bit weights. All tensors are contiguous and on one device.

    Attributes:
        packed: `[ceil(rows·columns / 2)]` uint8.
        absmax: `[blocks]`: float32, or uint8 where nested; `blocks = ceil(rows·columns / block_size)`.
        quant_type: `"nf4"` or `"fp4"`.
        block_size: weights that share an absmax, a power of two from 32 to 4096.
        nested_absmax: `[ceil(blocks / nested_block_size)]` float32; None: absmax is plain. With it, the absmax of a
            block is `nested_code[absmax]·nested_absmax[block // nested_block_size] + nested_offset`, product and sum
            each rounded to float32.
        nested_code: `[256]` float32.
        nested_offset: one float32.
        nested_block_size: blocks that share a nested absmax; 0 where absmax is plain.

    Raises:
        ValueError: a field does not fit the others; the message names it, its value and what is expected.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    block_size: int
    rows: int
    columns: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_block_size: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.quant_type, str) or self.quant_type not in LEVELS:
            raise _unexpected("quant_type", repr(self.quant_type), " or ".join(map(repr, LEVELS)))
        for name in ("rows", "columns"):
            _check_positive(name, getattr(self, name))
        size = self.block_size
        if not _is_integer(size) or size not in BLOCK_SIZES:
            raise _unexpected("block_size", repr(size), f"a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}")
        elements = self.rows * self.columns
        blocks = _ceil_div(elements, size)
        is_plain = self.nested_absmax is None and self.nested_code is None and self.nested_offset is None
        device = _check_tensor("packed", self.packed, torch.uint8, _ceil_div(elements, 2))
        _check_tensor("absmax", self.absmax, torch.float32 if is_plain else torch.uint8, blocks, device)
        if not is_plain:
            _check_positive("nested_block_size", self.nested_block_size)
            groups = _ceil_div(blocks, self.nested_block_size)
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, groups, device)
            _check_tensor("nested_code", self.nested_code, torch.float32, 256, device)
            _check_tensor("nested_offset", self.nested_offset, torch.float32, 1, device)

    @classmethod
    def from_bitsandbytes(cls, source: Any, *, check_code: bool = True) -> FourBitWeight:
        """Wraps the weight that bitsandbytes holds, without copying it.

        Args:
            source: a `Params4bit`, or the module that has one as its `weight`. A weight that has lost its quant
                state (sharding does that) takes the module's.
            check_code: compare the quant state's 16 levels with those of its type, which waits for the device.

        Raises:
            ValueError: it is not quantised, is damaged, or was repacked for inference on a CPU.
        """
        weight = source.weight if isinstance(source, nn.Module) else source
        if not isinstance(weight, Tensor):
            raise _unexpected("weight", type(weight).__name__, "a Params4bit or a module that has one as its weight")
        state: Any = getattr(weight, "quant_state", None) or getattr(source, "quant_state", None)
        if state is None:
            raise ValueError(
                "the weight has no quant state: it is not quantised yet (move the layer to its device), or has lost it "
                "(pass the module instead of the weight)"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked the weight for inference on this CPU (packing_format_for_cpu=True), with "
                "its scales rounded to bfloat16: load the model afresh and keep the layer in training mode"
            )
        shape = getattr(state, "shape", None)
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise _unexpected("quant_state.shape", shape, "(rows, columns)")
        rows, columns = shape
        for name, size in (("rows", rows), ("columns", columns)):
            _check_positive(name, size)
        nested: Any = getattr(state, "state2", None)
        if bool(getattr(state, "nested", nested is not None)) != (nested is not None):
            raise _unexpected("quant_state.nested", state.nested, f"{nested is not None}, as state2 is {nested}")
        parts: tuple[Any, ...] = ()
        if nested is not None:
            offset = state.offset
            is_float = isinstance(offset, Tensor) and offset.is_floating_point()
            parts = nested.absmax, nested.code, offset.float() if is_float else offset, nested.blocksize

        data = weight.detach()
        if data.dtype not in STORAGE_DTYPES:
            raise _unexpected("the storage's dtype", data.dtype, ", ".join(map(str, STORAGE_DTYPES)))
        if not data.is_contiguous():
            raise _unexpected("the packed weight", f"not contiguous (strides {data.stride()})", "contiguous")
        packed = data.view(-1).view(torch.uint8)
        needed = _ceil_div(rows * columns, 2)
        if 0 < packed.shape[0] - needed < data.element_size():  # the last storage element has spare bytes
            packed = packed[:needed]
        built = cls(packed, state.absmax, state.quant_type, state.blocksize, rows, columns, *parts)

        if check_code:  # bitsandbytes computes with the state's own table, so another one means damage
            _check_tensor("code", state.code, torch.float32, 16)
            if not (state.code.is_meta or torch.compiler.is_compiling()):
                code, expected = state.code.detach().cpu(), torch.tensor(LEVELS[built.quant_type])
                if not torch.allclose(code, expected, rtol=0, atol=1e-6):
                    got = [round(level, 6) for level in code.tolist()]
                    raise _unexpected("code", got, f"the 16 levels of {built.quant_type}")
        return built

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The operators' tensor arguments, in order."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_code, self.nested_offset

    @property
    def sizes(self) -> tuple[str, int, int, int, int]:
        """The operators' other arguments, in order."""
        return self.quant_type, self.block_size, self.nested_block_size, self.rows, self.columns


@functools.cache
def levels(quant_type: str, device: torch.device) -> Tensor:
    """Puts the 16 levels of `quant_type` on `device` for the kernels, in float32, once.

    A table made while a CUDA graph is captured would lie in that graph's memory, so it must be made earlier.

    Raises:
        RuntimeError: the allocator's address is not a multiple of 64.
    """
    table = torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=device)
    if table.data_ptr() % _TABLE_BYTES:
        raise RuntimeError(
            f"the allocator of {device} gave the address {table.data_ptr()}, but the kernels need a multiple of "
            f"{_TABLE_BYTES}: use torch's own allocator, or EPT_KERNELS=reference"
        )
    return table


class Weight(NamedTuple):
    """Arguments of `dequantize_4bit`, except the type of its result."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    block_size: int
    nested_block_size: int
    rows: int
    columns: int

    def pointers(self) -> tuple[Tensor | None, ...]:
        """Returns the first arguments of every kernel."""
        return (*self[:5], levels(self.quant_type, self.packed.device))


def _check_tensor(
    name: str, tensor: Any, dtype: torch.dtype, length: int, device: torch.device | None = None
) -> torch.device:
    if not isinstance(tensor, Tensor):
        raise _unexpected(name, type(tensor).__name__, "a tensor")
    if tensor.dtype != dtype:
        raise _unexpected(f"{name}.dtype", tensor.dtype, dtype)
    shapes = [(length,), ()] if name == "nested_offset" else [(length,)]
    if tuple(tensor.shape) not in shapes:
        raise _unexpected(f"{name}.shape", tuple(tensor.shape), shapes[0])
    if not tensor.is_contiguous():
        raise _unexpected(f"{name}.stride()", tensor.stride(), "(1,)")
    if device is not None and tensor.device != device:
        raise _unexpected(f"{name}.device", tensor.device, f"{device}, where the packed weight is")
    return tensor.device


def _check_positive(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        raise _unexpected(name, repr(value), "an integer, 1 or more")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _unexpected(what: str, got: Any, expected: Any) -> ValueError:
    return ValueError(f"4-bit weight: {what} is {got}, expected {expected}: quantise or load the weight afresh")
