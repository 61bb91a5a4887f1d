"""A call of an operator: its inputs, its correct result, and the error allowed to a kernel.

An operator's calls are in the `problems.py` of its folder; `dev/problems.py` lists all of them, for the tuner, the
ahead-of-time compiler, tests, opcheck and benchmarks. `problem.inputs(device, seed)` returns the arguments of schema
and launcher. Letters as in the method; a size of 0 switches its part off.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .library import reference_of

# Largest error of a result, relative to its largest magnitude: one unit in the last place of 16 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
TOLERANCE |= {torch.int32: 0.0, torch.uint8: 0.0}
TF32 = 2**-9  # relative error of a product of two factors that are truncated after ten bits

Device = torch.device | str
Results = Sequence[Tensor]
_P = TypeVar("_P", bound="Problem")


@dataclass(frozen=True)
class Problem(ABC):
    """One call of the operator `operator`."""

    operator: str = field(default="", kw_only=True)
    strided: bool = field(default=False, kw_only=True)  # whether tensors have gaps in every dimension

    @property
    def sizes(self) -> str:
        """Lists the sizes that differ from the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        changed = (f"{name}={value}" for name, value in values.items() if name not in ("operator", "vocabulary"))
        return ",".join(changed).replace("torch.", "")

    @property
    def name(self) -> str:
        return f"{self.operator} {self.sizes}".strip()

    @property
    def backward(self: _P) -> _P:
        """The problem of this operator's gradients."""
        return replace(self, operator=f"{self.operator}_backward")

    @property
    def small(self: _P) -> _P:
        """The same kernels on little data: fewer texts, because no kernel is compiled for their number."""
        return self

    def laid_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Puts gaps between the elements of `tensors`, if `strided`."""
        return tuple(strided(x) for x in tensors) if self.strided else tensors

    @abstractmethod
    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """Makes arguments of the operator with realistic content; the same for the same device and seed."""

    def expected(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Computes the results for `inputs` with the operator's reference in float64."""
        return as_tuple(reference_of(self.operator)(*in_float64(inputs)))

    def tolerance(self, dtype: torch.dtype) -> float:
        """Bounds the error of a result in `dtype`, relative to its largest magnitude; 0: all bits are equal."""
        return TOLERANCE[dtype]

    def errors_allowed(self, actual: Results, expected: Results, inputs: tuple[Any, ...]) -> list[float]:
        """Bounds the largest error of each of the `actual` results for `inputs`, given the exact ones."""
        return [self.tolerance(a.dtype) * largest(e) for a, e in zip(actual, expected, strict=True)]


class InTF32(Problem):
    """A problem whose kernel multiplies in TF32 if its results are rounded to 16 bits."""

    def errors_allowed(self, actual: Results, expected: Results, inputs: tuple[Any, ...]) -> list[float]:
        """Adds the effect of truncated factors on the sum of magnitudes, because summands may cancel."""
        allowed = super().errors_allowed(actual, expected, inputs)
        if all(a.dtype.itemsize != 2 for a in actual):
            return allowed
        magnitudes = (x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        sums = self.expected(*magnitudes)
        return [x + TF32 * largest(e) * (a.dtype.itemsize == 2) for x, a, e in zip(allowed, actual, sums, strict=True)]


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device)


def low_rank_prompt(
    g: torch.Generator, s: int, m: int, r: int, d: int, dtype: torch.dtype = torch.float32, adapters: int = 0
) -> list[Tensor]:
    """Draws the short prompt `[s, d]`, A `[m, r]` and B `[r, d]`, for each of the adapters if any."""
    lead = (adapters,) if adapters else ()
    return [normal(g, *lead, *shape).to(dtype) for shape in ((s, d), (m, r), (r, d))]


def strided(x: Tensor) -> Tensor:
    """Lays the same values out with gaps in every dimension, which hold NaN or an index far out of range."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    wide = torch.full([2 * size + 1 for size in x.shape], poison, dtype=x.dtype, device=x.device)
    gaps = tuple(slice(1, None, 2) for _ in x.shape)
    wide[gaps] = x
    return wide[gaps]


def in_float64(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Converts the floating-point tensors among `inputs` to float64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def largest(x: Tensor) -> float:
    """Returns the largest magnitude in `x`, 0 if it is empty."""
    return float(x.double().abs().max()) if x.numel() else 0.0


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Returns an operator's results as a tuple, even if there is only one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
