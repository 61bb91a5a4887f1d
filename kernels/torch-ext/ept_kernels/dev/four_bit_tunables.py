"""What the tuner measures of the 4-bit weights: the kernels at the shapes of a Llama and of a T5-base, and which way a
product of so many tokens goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..four_bit import dequantize as dequantize
from ..four_bit.matmul import matmul_4bit, matmul_4bit_kernel
from ..four_bit.matmul_backward import matmul_4bit_backward, matmul_4bit_backward_kernel
from ..four_bit.paths import BITSANDBYTES, COUNTS, FUSED, LIBRARY, has_bitsandbytes, has_fused, heuristic_path
from ..four_bit.reference import dequantize_parts
from ..four_bit.splits import TILES, Weight, aot_case, heuristic, key, run
from ..launch import AotCase, Config, Tunable, grid

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768))  # rows and columns of a weight
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
VARIANTS = ((32, True), (64, False), (128, False))  # block size and nesting of weights that share a configuration
# Numbers of tokens whose path is measured. Below 8, bitsandbytes' forward changes its path, and nothing else does.
PATH_COUNTS = {"matmul_4bit": COUNTS, "matmul_4bit_backward": tuple(count for count in COUNTS if count >= 8)}
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_GPU = torch.device("cuda")  # whichever it is

_DEQUANTIZE_GRID = grid(UNITS=(128, 256, 512), ITERS=(1, 2, 4, 8), num_warps=(4, 8))
_PRODUCT_GRIDS = {
    "matmul_4bit": grid(BLOCK_N=(64, 128), BLOCK_K=(128, 256), SPLITS=(1, 2, 4, 8), num_warps=(4, 8)),
    "matmul_4bit_backward": grid(BLOCK_N=(16, 32), BLOCK_K=(256, 512), SPLITS=(1, 2, 4, 8), num_warps=(4, 8)),
}


@dataclass(frozen=True)
class Product:
    """One of the two products; `before` and `after`: which of `(rows, columns)` a token has then."""

    operator: str
    kernel: Any
    launcher: Callable[..., Tensor]
    before: int
    after: int

    def arguments(self, tokens: Tensor, weight: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the launcher takes."""
        return (tokens, *weight) if "backward" in self.operator else (tokens, *weight[:5], None, *weight[5:])

    def fused(self, tokens: Tensor, *weight: Any) -> Tensor:
        """The fused kernel, however many tokens."""
        return run(self.kernel, self.operator, tokens, Weight(*weight), weight[-2:][self.after])

    def by_its_path(self, tokens: Tensor, *weight: Any) -> Tensor:
        """The operator's launcher, which looks the path up."""
        return self.launcher(*self.arguments(tokens, weight))

    def reference(self, *arguments: Any) -> Tensor:
        tokens, *weight = arguments
        arguments = (*weight, tokens.dtype)
        W = dequantize_parts(*arguments).double()
        return tokens.double() @ (W if self.after else W.T)


PRODUCTS = (
    Product("matmul_4bit", matmul_4bit_kernel, matmul_4bit, before=1, after=0),
    Product("matmul_4bit_backward", matmul_4bit_backward_kernel, matmul_4bit_backward, before=0, after=1),
)


def tunables(reduced: bool = False) -> list[Tunable]:
    """`reduced`: one tiny shape and two candidates each."""
    with contextlib.suppress(ImportError):  # without it there is one path less to measure
        import bitsandbytes  # noqa: F401
    shapes = ((32, 128),) if reduced else SHAPES
    # Under the interpreter, which the reduced ones are for, bfloat16 is truncated.
    dtype, most = (torch.float16, 2) if reduced else (torch.bfloat16, None)
    by_elements = {rows * columns: (rows, columns) for rows, columns in shapes}  # all that a dequantisation depends on
    found = [_dequantize(shape, dtype, most) for shape in by_elements.values()]
    for shape in shapes:
        for product in PRODUCTS:
            found += [_product(product, tile, shape, dtype, most) for tile in TILES]
    # After all kernels, since paths are measured with those that have won.
    for shape in shapes:
        for product in PRODUCTS:
            counts = PATH_COUNTS[product.operator][: 2 * most if most else None]
            found += [_path(product, count, shape, dtype) for count in counts]
        if not reduced:
            found += [_path(PRODUCTS[0], count, shape, torch.float32) for count in COUNTS if count <= 8]
    return found


def weight_arguments(
    shape: tuple[int, int],
    device: torch.device,
    g: torch.Generator,
    block_size: int = BLOCK_SIZE,
    nested: bool = True,
) -> tuple[Any, ...]:
    """Parts and sizes of a random NF4 weight, as the operators take them."""
    rows, columns = shape
    blocks = -(-rows * columns // block_size)

    def random_bytes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), generator=g, device=device, dtype=torch.uint8)

    packed = random_bytes(-(-rows * columns // 2))
    if not nested:
        absmax = torch.rand(blocks, generator=g, device=device)
        return packed, absmax, None, None, None, "nf4", block_size, 0, rows, columns
    code = torch.linspace(-1, 1, 256, device=device)
    nested_absmax = torch.rand(-(-blocks // NESTED_BLOCK_SIZE), generator=g, device=device)
    parts = (packed, random_bytes(blocks), nested_absmax, code, code.new_full((), 0.1))
    return (*parts, "nf4", block_size, NESTED_BLOCK_SIZE, rows, columns)


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, most: int | None) -> Tunable:
    def inputs_of(shape: tuple[int, int], *kind: Any) -> Callable[[torch.device, int], tuple[Any, ...]]:
        return lambda device, seed: (
            *weight_arguments(shape, device, torch.Generator(device).manual_seed(seed), *kind),
            dtype,
        )

    odd = (shape[0] - 1, shape[1] - 1)  # no whole words
    return Tunable(
        kernel=key("dequantize_4bit", dtype),
        size=(shape[0] * shape[1],),
        default=dequantize.heuristic(),
        candidates=_DEQUANTIZE_GRID[:most],
        operator=dequantize.dequantize_4bit,
        inputs=inputs_of(shape),
        reference=dequantize_parts,
        aot=lambda config: dequantize.aot_case(config, TRITON_TYPES[dtype], BLOCK_SIZE, nested=True, words=True),
        tolerance=0.0,
        variants=[inputs_of(shape, *kind) for kind in VARIANTS] + [inputs_of(odd)],
    )


def _product(product: Product, tile: int, shape: tuple[int, int], dtype: torch.dtype, most: int | None) -> Tunable:
    kernel = f"{product.operator}/{tile}"
    return Tunable(
        kernel=key(kernel, dtype),
        size=shape,
        default=heuristic(kernel, *shape),
        candidates=_PRODUCT_GRIDS[product.operator][:most],
        operator=product.fused,
        inputs=_inputs(product, tile, shape, dtype),
        reference=product.reference,
        aot=_aot(product, kernel, shape, dtype),
        variants=[_inputs(product, tile, shape, torch.float16, *kind) for kind in VARIANTS],
    )


def _path(product: Product, count: int, shape: tuple[int, int], dtype: torch.dtype) -> Tunable:
    paths = [LIBRARY]
    if has_fused(dtype, _GPU):
        paths.append(FUSED)
    if product.operator == "matmul_4bit" and has_bitsandbytes():
        paths.append(BITSANDBYTES)
    return Tunable(
        kernel=key(f"{product.operator}.path", dtype),
        size=(count, *shape),
        default={"PATH": heuristic_path(product.operator, count, dtype, _GPU)},
        candidates=[{"PATH": path} for path in paths],
        operator=product.by_its_path,
        inputs=_inputs(product, count, shape, dtype),
        reference=product.reference,
        aot=lambda _: dequantize.aot_case(dequantize.heuristic(), TRITON_TYPES[dtype], BLOCK_SIZE, True, words=True),
    )


def _inputs(
    product: Product, tokens: int, shape: tuple[int, int], dtype: torch.dtype, *kind: Any
) -> Callable[[torch.device, int], tuple[Any, ...]]:
    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        x = torch.randn(tokens, shape[product.before], generator=g, device=device).to(dtype)
        return x, *weight_arguments(shape, device, g, *kind)

    return inputs


def _aot(product: Product, kernel: str, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[Config], AotCase]:
    def aot(config: Config) -> AotCase:
        return aot_case(
            kernel, product.kernel, config, *shape, TRITON_TYPES[dtype], BLOCK_SIZE, nested=True, bias=False
        )

    return aot
