"""The checkout that the tests of the package look at, and fresh interpreters started in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter in the repository root, which must exit with `code`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{arguments} exited with {done.returncode}:\n{done.stderr}"
    return done
