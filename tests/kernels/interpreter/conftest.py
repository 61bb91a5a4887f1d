"""The kernels under Triton's interpreter. It is chosen when Triton is imported, so these tests run in a process of
their own: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreter`` (part of ``make test``).
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
