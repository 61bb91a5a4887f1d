"""The command line answers `--help` and names its commands, quickly: help must not load a model library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "evaluate", "predict", "tasks", "env")


def run(code: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")]),
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [sys.executable, *code.split()], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("module", ["ept", "ept.cli.main"])
def test_help_names_every_command(module: str) -> None:
    done = run(f"-m {module} --help")
    assert done.returncode == 0, done.stderr
    missing = [command for command in COMMANDS if command not in done.stdout]
    assert not missing, f"`ept --help` does not name {missing}:\n{done.stdout}"


def test_unknown_command_fails() -> None:
    done = run("-m ept.cli.main trian")
    assert done.returncode != 0
    assert "trian" in done.stdout + done.stderr


def test_help_loads_no_model_library() -> None:
    done = run("-X importtime -m ept.cli.main --help")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "transformers", "peft", "datasets", "matplotlib", "sklearn"}
