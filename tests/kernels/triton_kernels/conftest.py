"""The Triton kernels against their references: on a GPU (`make gpu`), or on CPU tensors under Triton's interpreter
(`make test`). Which of the two is chosen when Triton is imported, so these tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/triton_kernels`, or with `EPT_KERNELS=triton` on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not (os.environ.get("EPT_KERNELS") == "triton" and torch.cuda.is_available()):
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN, or an index far outside, until a kernel writes it."""
    new_empty = torch.Tensor.new_empty

    def poisoned_new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)
