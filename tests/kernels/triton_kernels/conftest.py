"""The Triton kernels against their references: on a GPU (`make gpu`), or on CPU tensors under Triton's interpreter
(`make test`). Which of the two is chosen when Triton is imported, so these tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/triton_kernels`, or with `EPT_KERNELS=triton` on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not (os.environ.get("EPT_KERNELS") == "triton" and torch.cuda.is_available()):
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")
