"""A case made ready to run: its inputs, several sets of them, and one call for every version.

A version that cannot run here is in `skipped` with the reason, never left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import counts
from .shapes import COMPILED, EAGER, OURS, OURS_AGAIN, Case, copies
from .timing import Call

MOST_BYTES = 8 << 30  # for all input sets of one case together
MOST_SETS = 256
CPU_CACHE = 32 << 20  # assumed: PyTorch does not tell the size of a CPU's last-level cache

# ‖out − reference‖ / ‖reference‖ that a version may reach before its time counts.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Problem:
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
    must_equal: str | None = None


def problem_of(
    case: Case,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    counted: counts.Counts,
    dtype: torch.dtype,
) -> Problem:
    """The problem whose versions are ours and our reference, plain and compiled, all called with `arguments[i]`."""
    calls: dict[str, Call] = {
        OURS: lambda i: ours(*arguments[i]),
        OURS_AGAIN: lambda i: ours(*arguments[i]),
        EAGER: lambda i: reference(*arguments[i]),
    }
    if COMPILED in case.providers:
        torch._dynamo.reset()
        compiled = torch.compile(reference, fullgraph=True, dynamic=False)
        calls[COMPILED] = lambda i: compiled(*arguments[i])
    return Problem(
        calls={name: call for name, call in calls.items() if name in case.providers},
        sets=len(arguments),
        counted=counted,
        reference=lambda: reference(*arguments[0]),
        tolerance=TOLERANCES[dtype],
    )


def add_peer(problem: Problem, provider: str, make: Callable[[], Call]) -> None:
    """Adds a version that needs a library, or the reason why that library cannot be used."""
    library = provider.lower()
    if importlib.util.find_spec(library) is None:
        problem.skipped[provider] = f"{library} is not installed"
        return
    try:
        problem.calls[provider] = make()
    except Exception as error:  # whatever a peer raises here is the reason that its row gives
        problem.skipped[provider] = f"{type(error).__name__}: {error}"


def input_sets(inputs: Callable[[], tuple[Any, ...]], counted: counts.Counts, device: str) -> list[tuple[Any, ...]]:
    """Sets of inputs that together are larger than the cache and no larger than `MOST_BYTES`."""
    first = inputs()
    held = sum(x.nbytes for x in _tensors(first))
    number = copies(counted.bytes, last_level_cache(device), min(MOST_SETS, max(2, MOST_BYTES // max(held, 1))))
    return [first, *(inputs() for _ in range(number - 1))]


def last_level_cache(device: str) -> int:
    """Bytes of the device's last-level cache."""
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else CPU_CACHE


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, tuple):
        for part in nested:
            yield from _tensors(part)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)
